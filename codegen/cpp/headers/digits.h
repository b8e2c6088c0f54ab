// One row of x as integers, a block of numbers at a time: of 24 bits in three digits of 8, or of 30 in two words.
//
//   x[i] of a block  =  unit * steps[block] * (d0 + 256 d1 + 65536 d2)  +- half a step
//   x[i] of a block  =  unit * steps[block] * (32768 high + low)        +- half a step
//
// unit and steps are powers of two; the largest number of a block takes 22 or 23 bits and a sign, or 28 or 29.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "functions.h"
#include "keeps.h"
#include "kernel.h"

namespace bitfold {

// What a call with digits reads: for 32 numbers, 32 of each digit, or their high words and the low ones; for a block, a
// step, and for digits eight sums of its integers, by fours, times how much codes are too high; where eight groups lie
// side by side, the digits of four numbers of each in turn, and sums of each.
struct Digits {
  std::vector<int8_t> digits;
  std::vector<int32_t> middles;
  std::vector<float> steps;
  std::vector<int> exponents;
};

// The digits of 32 integers, and their sums by fours.
inline void cut(const int32_t* v, int8_t* to, int32_t* sums) {
  int8_t d0[32], d1[32], d2[32];
  for (int i = 0; i < 32; ++i) {
    d0[i] = static_cast<int8_t>(v[i]);
    const int32_t rest = (v[i] - d0[i]) >> 8;
    d1[i] = static_cast<int8_t>(rest);
    d2[i] = static_cast<int8_t>((rest - d1[i]) >> 8);
  }
  std::memcpy(to, d0, 32), std::memcpy(to + 32, d1, 32), std::memcpy(to + 64, d2, 32);
  for (int j = 0; j < 8; ++j) sums[j] += v[4 * j] + v[4 * j + 1] + v[4 * j + 2] + v[4 * j + 3];
}

// `count` integers from number `at` of a group on, where eight groups lie side by side, four numbers of each in turn. A
// sum is of `joined` numbers of the group; those of eight groups lie together.
inline void cut_in_lane(const int32_t* v, int64_t at, int count, int64_t joined, int8_t* to, int32_t* sums) {
  for (int i = 0; i < count; i += 4) {
    int8_t d[3][4];
    for (int j = 0; j < 4; ++j) {
      const int32_t n = v[i + j];
      d[0][j] = static_cast<int8_t>(n);
      const int32_t rest = (n - d[0][j]) >> 8;
      d[1][j] = static_cast<int8_t>(rest);
      d[2][j] = static_cast<int8_t>((rest - d[1][j]) >> 8);
    }
    int8_t* const four = to + (at + i) / 4 * (3 * 4 * kLanes);
    for (int digit = 0; digit < 3; ++digit) std::memcpy(four + 4 * kLanes * digit, d[digit], 4);
    sums[(at + i) / joined * kLanes] += v[i] + v[i + 1] + v[i + 2] + v[i + 3];
  }
}

// The words of 32 integers, high ones first.
inline void cut(const int32_t* v, int16_t* to) {
  for (int i = 0; i < 32; ++i) {
    const int32_t high = (v[i] + (1 << 14)) >> 15;
    int16_t* const word = to + i / 16 * 32 + i % 16;
    word[0] = static_cast<int16_t>(high), word[16] = static_cast<int16_t>(v[i] - high * 32768);
  }
}

// Whether x, `padded` numbers of float32, was made into digits; else numbers are not finite, or too many of a block
// are so much smaller than its largest that their digits would say little of them.
inline bool in_digits(const float* x, int64_t padded, const Wants& wants, Digits& to, Call& call) {
  const bool words = wants.words != 0;
  const int64_t block = wants.digits, blocks = (padded + block - 1) / block, bytes = words ? 4 : 3;
  const int shift = words ? 28 : 22, least = shift - 126;  // below, a step would be no normal number
  // Words lie across lines: on an EPYC int8 is read from memory faster so, and slower from the cache; why is not known.
  int8_t* const digits = lined_up(to.digits, bytes * padded, words ? 16 : 0);
  to.steps.resize(blocks + 16), to.exponents.resize(blocks);
  const int64_t joins = wants.lanes != 0 ? block / wants.joined : kLanes;  // sums of a block
  const int64_t count_of_sums = words ? 0 : joins * blocks;
  int32_t* const middles = lined_up(to.middles, count_of_sums);
  std::fill_n(middles, count_of_sums, 0);
  int highest = least;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* from = x + b * block;
    const int64_t count = std::min(block, padded - b * block);
    int32_t top = 0;  // of magnitudes, as the integers that their bits are
    for (int64_t i = 0; i < count; ++i) {
      int32_t bits;
      std::memcpy(&bits, from + i, 4);
      top = std::max(top, bits & 0x7fffffff);
    }
    if (top >= 0x7f800000) return false;
    // The largest number as 1 .. 2 times 2**exponent; as an integer one bit less if it were rounded past the digits.
    int e = std::max((top >> 23) - 127, least) + (!words && (top & 0x7fffff) > 0x7e0000);
    to.exponents[b] = e;
    highest = std::max(highest, e);
    const float inverse = power_of_two(shift - e);
    int32_t small = 0;
    alignas(64) int32_t v[32];
    for (int64_t at = 0; at < count; at += 32) {
      const int some = static_cast<int>(std::min<int64_t>(32, count - at));
      for (int i = 0; i < some; ++i) {
        v[i] = static_cast<int32_t>(std::nearbyint(from[at + i] * inverse));
        small += (std::abs(v[i]) < 64) & (from[at + i] != 0.0f);
      }
      int8_t* const cuts = digits + bytes * (b * block + at);
      if (words)
        cut(v, reinterpret_cast<int16_t*>(cuts));
      else if (wants.lanes == 0)
        cut(v, cuts, middles + joins * b);
      else
        cut_in_lane(v, at, some, wants.joined, digits + 3 * block * (b - b % kLanes) + 4 * (b % kLanes),
                    middles + joins * (b - b % kLanes) + b % kLanes);
    }
    if (4 * small > count) return false;
  }
  for (int64_t i = 0; i < count_of_sums; ++i) middles[i] *= -wants.base;
  if (highest == least) return false;  // nothing but zeros, or numbers that are next to none
  for (int64_t b = 0; b < blocks; ++b) to.steps[b] = power_of_two(std::max(to.exponents[b] - highest, -126));
  call.digits = digits, call.middles = middles, call.steps = to.steps.data();
  call.x_unit = power_of_two(std::max(highest - shift, -126));
  return true;
}

}  // namespace bitfold
