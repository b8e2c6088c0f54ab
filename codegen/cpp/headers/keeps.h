// Memory that a thread keeps from call to call: what a large call took is given back by the next small one.
//
//   gives_back(numbers, 1000), where they have room for 100 million   ->   an empty vector
#pragma once
#include <cstddef>
#include <vector>

namespace bitfold {

// wanted: how many numbers this call has, about.
template <class T> void gives_back(std::vector<T>& held, size_t wanted) {
  constexpr size_t most = 16 << 20;  // bytes that are kept in any case
  if (held.capacity() * sizeof(T) > most && held.capacity() / 8 > wanted) std::vector<T>().swap(held);
}

}  // namespace bitfold
