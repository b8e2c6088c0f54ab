// Memory that a thread keeps from call to call: what a large call took is given back by the next small one; and where
// in it vectors lie.
//
//   gives_back(numbers, 1000), where they have room for 100 million   ->   an empty vector
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace bitfold {

// wanted: how many numbers this call has, about.
template <class T> void gives_back(std::vector<T>& held, size_t wanted) {
  constexpr size_t most = 16 << 20;  // bytes that are kept in any case
  if (held.capacity() * sizeof(T) > most && held.capacity() / 8 > wanted) std::vector<T>().swap(held);
}

// `count` numbers from `behind` numbers after a line of the cache on. Otherwise malloc says by chance how loads lie, for as
// long as the memory is kept.
template <class T> T* lined_up(std::vector<T>& held, int64_t count, int64_t behind = 0) {
  constexpr size_t line = 64;
  held.resize(count + behind + line / sizeof(T));
  T* const at = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(held.data()) + line - 1) / line * line) + behind;
  held.resize(at - held.data() + count);  // a sanitizer watches its end
  return at;
}

}  // namespace bitfold
