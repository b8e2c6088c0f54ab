// Eight stored numbers as float32, one by one; see eights.h.
#pragma once
#include <cstdint>

namespace bitfold {

template <class T> void eight(const void* p, int64_t i, float* to) {
  for (int j = 0; j < 8; ++j) to[j] = T::get(p, i + j);
}

}  // namespace bitfold
