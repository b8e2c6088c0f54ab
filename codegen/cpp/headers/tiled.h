// Many rows of x as tiles of AMX take them: panels of sixteen rows, four numbers of each in turn; bytes as they are, or
// float32 in digits of 8 bits (digits.h), a block of numbers at a time.
//
//   bytes:   [rows / 16][numbers / 4][16][4]
//   digits:  [rows / 16][numbers / step][3 digits][step / 4][16][4], and a power of two for each block and row
//
// A task is a stretch of a panel's numbers, so that all threads have work where there are few panels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "digits.h"
#include "kernel.h"
#include "transposed.h"

namespace bitfold {

constexpr int kAside = 16;        // rows of a panel
constexpr int64_t kOfTask = 1024;  // numbers of a stretch
constexpr int kMostOfBlock = 128;  // numbers that share a power of two

inline int64_t stretches(int64_t padded) { return (padded + kOfTask - 1) / kOfTask; }
inline int64_t tasks_of_tiled(int64_t m, int64_t padded) { return (m + kAside - 1) / kAside * stretches(padded); }

// Numbers at .. last - 1, whole fours, of up to sixteen rows of k; zeros behind them, and for rows that are not there.
inline void by_fours(const int8_t* x, int64_t k, int64_t rows, int64_t first, int64_t last, int8_t* to) {
  int64_t at = first;
  for (; rows >= kAside && at + 64 <= std::min(last, k); at += 64) transposed(x + at, k, to + at * kAside, 64);
  for (; at < last; at += 4)
    for (int64_t r = 0; r < kAside; ++r) {
      int32_t four = 0;
      if (r < rows && at + 4 <= k)
        std::memcpy(&four, x + r * k + at, 4);
      else if (r < rows && at < k)
        std::memcpy(&four, x + r * k + at, k - at);
      std::memcpy(to + (at * kAside + 4 * r), &four, 4);
    }
}

// x, [m, k], in bytes: tasks begin .. end - 1.
inline void bytes_tiled(const int8_t* x, int64_t m, int64_t k, int64_t padded, int8_t* to, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / stretches(padded) * kAside, first = task % stretches(padded) * kOfTask;
    by_fours(x + row * k, k, m - row, first, std::min(first + kOfTask, padded), to + row * padded);
  }
}

// A block of up to 128 numbers of one row in digits, and their unit; false if they have none. Numbers of 2**64 and more
// have none either: in units of codes their sums might pass float32.
inline bool cut_block(const float* x, int64_t count, int8_t (*digits)[kAside][kMostOfBlock], int64_t row, float& unit) {
  constexpr int shift = 22, least = shift - 126, most = 63;
  int32_t top = 0;  // of magnitudes, as the integers that their bits are
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  // As in `in_digits`: one bit less if the largest were rounded past the digits.
  const int e = (top >> 23) - 127 + ((top & 0x7fffff) > 0x7e0000);
  if (e > most || (e < least && top != 0)) return false;
  const int exponent = std::max(e, least);
  const float inverse = power_of_two(shift - exponent);
  unit = power_of_two(exponent - shift);
  int32_t small = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t v = static_cast<int32_t>(std::nearbyint(x[i] * inverse));
    small += (std::abs(v) < 64) & (x[i] != 0.0f);
    const int32_t rest = (v + 128) >> 8;  // v less its lowest digit, without it
    digits[0][row][i] = static_cast<int8_t>(v);
    digits[1][row][i] = static_cast<int8_t>(rest);
    digits[2][row][i] = static_cast<int8_t>((rest + 128) >> 8);
  }
  return 4 * small <= count;
}

// x, `m` rows of `padded` float32, in digits: tasks begin .. end - 1. units: [blocks][across]; refused: a byte for each
// `width` rows, not 0 if one of them has no digits.
inline void digits_tiled(const float* x, int64_t m, int64_t padded, const Wants& wants, int64_t across, int8_t* to,
                         float* units, uint8_t* refused, int64_t begin, int64_t end) {
  const int64_t block = wants.many, step = wants.step;
  alignas(64) int8_t digits[3][kAside][kMostOfBlock] = {};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / stretches(padded) * kAside, first = task % stretches(padded) * kOfTask;
    const int64_t rows = std::min<int64_t>(kAside, m - row);
    int8_t* const panel = to + 3 * row * padded;
    std::memset(digits, 0, sizeof digits);
    for (int64_t k = first; k < std::min(first + kOfTask, padded); k += block) {
      const int64_t count = std::min(block, padded - k);
      float* const of_block = units + k / block * across + row;
      std::fill_n(of_block, kAside, 0.0f);
      for (int64_t r = 0; r < rows; ++r)
        if (!cut_block(x + (row + r) * padded + k, count, digits, r, of_block[r]))
          __atomic_store_n(&refused[row / wants.width], uint8_t(1), __ATOMIC_RELAXED);  // by any of some tasks
      for (int64_t at = 0; at < count; at += step)
        for (int d = 0; d < 3; ++d) {
          int8_t* const tile = panel + (3 * (k + at) + d * step) * kAside;
          if (step == 64) {
            transposed(&digits[d][0][at], kMostOfBlock, tile, 64);
            continue;
          }
          for (int64_t r = 0; r < kAside; ++r)
            for (int64_t i = 0; i < step; i += 4) std::memcpy(tile + i * kAside + 4 * r, &digits[d][r][at + i], 4);
        }
    }
  }
}

}  // namespace bitfold
