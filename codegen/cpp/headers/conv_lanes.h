// Sums of products of bytes for the sixteen rows of a panel, exact in 32 bits, and a row of a depthwise kernel.
//
//   Tile<positive, rows, halves>   sums of `rows` pixels and 8 * halves rows of the weight, four channels a step
//   positive: no number of x is negative, so that two products with bytes fit in 16 bits
//   zero: the code of x that stands for 0; it is taken off each code, exactly. A positive x has none.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "functions.h"

namespace bitfold {

constexpr int kChannels = 16;

inline int32_t four(const int8_t* p) {
  int32_t r;
  std::memcpy(&r, p, 4);
  return r;
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

constexpr int kPixels = 8;  // pixels of a tile
template <bool positive> constexpr int kBytes = 1;  // of a number of x

template <bool positive, int rows, int halves> struct Tile {
  // A product is added four cycles after it is begun, and one is begun in each: so many sums of few pixels are under way.
  static constexpr int kChains = rows == 1 ? 4 : rows < 4 ? 2 : 1;
  __m512i sums[kChains][rows], of_weight[kChains], surplus;

  void clear(int32_t zero) {
    for (auto& chain : sums)
      for (auto& s : chain) s = _mm512_setzero_si512();
    for (auto& s : of_weight) s = _mm512_setzero_si512();
    surplus = _mm512_set1_epi8(static_cast<char>(128 + zero));
  }
  // w: four channels of sixteen rows; at: the same four channels of each pixel, `offset` bytes further.
  template <int chain> void add(const uint8_t* w, const int8_t* const* at, int64_t offset) {
    const __m512i weight = _mm512_loadu_si512(w);
    if constexpr (!positive) of_weight[chain] = _mm512_dpbusd_epi32(of_weight[chain], surplus, weight);
    for (int r = 0; r < rows; ++r) {
      __m512i x = _mm512_set1_epi32(four(at[r] + offset));
      // 128 more than x is never negative; the surplus, 128 and the zero point times the weight's sum, goes at the end.
      if constexpr (!positive) x = _mm512_xor_si512(x, _mm512_set1_epi8(-128));
      sums[chain][r] = _mm512_dpbusd_epi32(sums[chain][r], x, weight);
    }
  }
  void join() {
    for (int chain = 1; chain < kChains; ++chain) {
      for (int r = 0; r < rows; ++r) sums[0][r] = _mm512_add_epi32(sums[0][r], sums[chain][r]);
      of_weight[0] = _mm512_add_epi32(of_weight[0], of_weight[chain]);
    }
  }
  void store(int r, int32_t* to) const {
    _mm512_storeu_si512(to, positive ? sums[0][r] : _mm512_sub_epi32(sums[0][r], of_weight[0]));
  }
};

#elif defined(__AVX2__)

constexpr int kPixels = 4;
// Numbers of either sign are multiplied in 16 bits; they are widened once for all panels.
template <bool positive> constexpr int kBytes = positive ? 1 : 2;

inline __m256i evens(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
inline __m256i odds(__m256i v) { return _mm256_srai_epi16(v, 8); }

template <bool positive, int rows, int halves> struct Tile {
  static constexpr int kChains = 1;  // sums are added in one cycle
  __m256i sums[rows][halves];

  void clear(int32_t) {
    for (auto& row : sums)
      for (auto& s : row) s = _mm256_setzero_si256();
  }
  template <int> void add(const uint8_t* w, const int8_t* const* at, int64_t offset) {
    __m256i weight[halves];
    for (int h = 0; h < halves; ++h) weight[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w) + h);
    if constexpr (positive) {
      const __m256i ones = _mm256_set1_epi16(1);
      for (int r = 0; r < rows; ++r) {
        const __m256i x = _mm256_set1_epi32(four(at[r] + offset));
        for (int h = 0; h < halves; ++h) {
          const __m256i pairs = _mm256_maddubs_epi16(x, weight[h]);  // at most 2 * 127 * 128: fits
          sums[r][h] = _mm256_add_epi32(sums[r][h], _mm256_madd_epi16(pairs, ones));
        }
      }
    } else {
      __m256i even[halves], odd[halves];
      for (int h = 0; h < halves; ++h) even[h] = evens(weight[h]), odd[h] = odds(weight[h]);
#pragma GCC unroll 4  // or the sums are kept in memory for the sake of their index
      for (int r = 0; r < rows; ++r) {
        const __m256i x0 = _mm256_set1_epi32(four(at[r] + offset)), x1 = _mm256_set1_epi32(four(at[r] + offset + 4));
        for (int h = 0; h < halves; ++h) {
          const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(even[h], x0), _mm256_madd_epi16(odd[h], x1));
          sums[r][h] = _mm256_add_epi32(sums[r][h], both);
        }
      }
    }
  }
  void join() {}
  void store(int r, int32_t* to) const {
    for (int h = 0; h < halves; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + h, sums[r][h]);
  }
};

#else

constexpr int kPixels = 4;
template <bool positive> constexpr int kBytes = 1;

template <bool positive, int rows, int halves> struct Tile {
  static constexpr int kChains = 1;
  int32_t sums[rows][kChannels], origin;

  void clear(int32_t zero) { std::memset(sums, 0, sizeof sums), origin = zero; }
  template <int> void add(const uint8_t* w, const int8_t* const* at, int64_t offset) {
    const int8_t* weight = reinterpret_cast<const int8_t*>(w);
    for (int r = 0; r < rows; ++r)
      for (int n = 0; n < 8 * halves; ++n)
        for (int i = 0; i < 4; ++i) sums[r][n] += (at[r][offset + i] - origin) * weight[4 * n + i];
  }
  void join() {}
  void store(int r, int32_t* to) const { std::memcpy(to, sums[r], sizeof(int32_t) * 8 * halves); }
};

#endif

// Each four numbers a b c d as a c b d in 16 bits, the order in which a weight's even and odd bytes are taken; `depth`
// numbers at a time, filled with zeros to fours. The zero point is taken off here.
inline void widened(const int8_t* from, int64_t count, int64_t depth, int32_t zero, int16_t* to) {
  const auto less = [zero](int8_t v) { return static_cast<int16_t>(v - zero); };
  if (depth % 4 != 0) {
    int64_t done = 0;
#if defined(__AVX2__)
    if (depth < 4) {  // an image's colours: four pixels at once, as long as there are sixteen bytes to load
      alignas(16) int8_t places[16];
      alignas(32) int16_t live[16];
      for (int i = 0; i < 16; ++i) {
        const int channel = i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4;
        places[i] = static_cast<int8_t>(i / 4 * depth + channel);
        live[i] = channel < depth ? -1 : 0;
      }
      const __m128i take = _mm_load_si128(reinterpret_cast<const __m128i*>(places));
      const __m256i keep = _mm256_load_si256(reinterpret_cast<const __m256i*>(live));
      const __m256i none = _mm256_set1_epi16(static_cast<int16_t>(zero));
      for (; (count - done) * depth >= 16; done += 4, from += 4 * depth, to += 16) {
        const __m128i read = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), take);
        const __m256i v = _mm256_and_si256(_mm256_sub_epi16(_mm256_cvtepi8_epi16(read), none), keep);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
      }
    }
#endif
    for (int64_t i = done; i < count; ++i, from += depth)
      for (int64_t j = 0; j < depth; j += 4, to += 4) {
        to[0] = less(from[j]);
        to[1] = j + 2 < depth ? less(from[j + 2]) : 0;
        to[2] = j + 1 < depth ? less(from[j + 1]) : 0;
        to[3] = j + 3 < depth ? less(from[j + 3]) : 0;
      }
    return;
  }
  int64_t i = 0;
  const int64_t all = count * depth;
#if defined(__AVX2__)
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const __m256i origin = _mm256_set1_epi16(static_cast<int16_t>(zero));
  for (; i + 16 <= all; i += 16) {
    const __m256i read = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    const __m256i v = _mm256_sub_epi16(read, origin);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_shuffle_epi8(v, order));
  }
#endif
  for (; i < all; i += 4) {
    to[i] = less(from[i]), to[i + 1] = less(from[i + 2]);
    to[i + 2] = less(from[i + 1]), to[i + 3] = less(from[i + 3]);
  }
}

// Sixteen numbers kept to low .. high; NaN, the second operand of each comparison, stays.
inline void between(float low, float high, float* v) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(v, _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), _mm512_loadu_ps(v))));
#elif defined(__AVX2__)
  for (int h = 0; h < 16; h += 8) {
    const __m256 more = _mm256_max_ps(_mm256_set1_ps(low), _mm256_loadu_ps(v + h));
    _mm256_storeu_ps(v + h, _mm256_min_ps(_mm256_set1_ps(high), more));
  }
#else
  for (int i = 0; i < kChannels; ++i) {
    const float more = v[i] < low ? low : v[i];
    v[i] = more > high ? high : more;
  }
#endif
}

// Sixteen numbers as codes: times `inverse`, rounded to even, `zero` more, kept to -128 .. 127; NaN is 0.
// Further from 0 than kFar all numbers have the outermost codes, whatever the zero point.
constexpr float kFar = 300.0f;

#if defined(__AVX512F__) && defined(__AVX512DQ__)

inline void codes(const float* from, float inverse, int32_t zero, int8_t* to) {
  const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(inverse));
  const __m512 near = _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(kFar)), _mm512_set1_ps(-kFar));
  const __m512i whole = _mm512_maskz_add_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), _mm512_cvtps_epi32(near),
                                               _mm512_set1_epi32(zero));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(whole));
}

inline void codes(const float* from, float inverse, int8_t* to) {
  const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(inverse));
  const __m512i whole = _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q),
                                                 _mm512_min_ps(v, _mm512_set1_ps(127.0f)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(whole));
}

#elif defined(__AVX2__)

inline void packed(const __m256i* whole, int8_t* to) {
  const __m256i pairs = _mm256_packs_epi32(whole[0], whole[1]);  // 0-3, 8-11; 4-7, 12-15
  const __m256i order = _mm256_permute4x64_epi64(pairs, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packs_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1)));
}
inline void codes(const float* from, float inverse, int32_t zero, int8_t* to) {
  __m256i whole[2];
  for (int h = 0; h < 2; ++h) {
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(from + 8 * h), _mm256_set1_ps(inverse));
    const __m256 near = _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(kFar)), _mm256_set1_ps(-kFar));
    const __m256i more = _mm256_add_epi32(_mm256_cvtps_epi32(near), _mm256_set1_epi32(zero));
    whole[h] = _mm256_and_si256(more, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q)));
  }
  packed(whole, to);
}
inline void codes(const float* from, float inverse, int8_t* to) {
  __m256i whole[2];
  for (int h = 0; h < 2; ++h) {
    __m256 v = _mm256_mul_ps(_mm256_loadu_ps(from + 8 * h), _mm256_set1_ps(inverse));
    v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
    whole[h] = _mm256_cvtps_epi32(_mm256_min_ps(v, _mm256_set1_ps(127.0f)));
  }
  packed(whole, to);
}

#else

inline void codes(const float* from, float inverse, int32_t zero, int8_t* to) {
  for (int i = 0; i < kChannels; ++i) {
    const float v = std::nearbyint(std::fmin(std::fmax(from[i] * inverse, -kFar), kFar)) + static_cast<float>(zero);
    to[i] = from[i] * inverse == from[i] * inverse ? static_cast<int8_t>(std::fmin(std::fmax(v, -128.0f), 127.0f)) : 0;
  }
}
inline void codes(const float* from, float inverse, int8_t* to) {
  for (int i = 0; i < kChannels; ++i) {
    const float v = from[i] * inverse;
    to[i] = v == v ? static_cast<int8_t>(std::nearbyint(std::fmin(std::fmax(v, -128.0f), 127.0f))) : 0;
  }
}

#endif

// Depthwise: sixteen channels of one pixel, a tap at a time.
#if defined(__AVX2__)

inline __m256i wide(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Weights of sixteen channels as pairs of taps in 16 bits, [pair][half][16].
inline void woven(const uint8_t* weight, int taps, int64_t stride, int16_t* to) {
  const __m256i none = _mm256_setzero_si256();
  for (int t = 0; t < taps; t += 2) {
    const auto* w = reinterpret_cast<const int8_t*>(weight);
    const __m256i a = wide(w + t * stride), b = t + 1 < taps ? wide(w + (t + 1) * stride) : none;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * t), _mm256_unpacklo_epi16(a, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * t + 16), _mm256_unpackhi_epi16(a, b));
  }
}
template <int kTaps, bool kZero>
inline void each_channel(const int8_t* const* at, int64_t offset, int count, const int16_t* weight, int32_t zero,
                         int32_t* sums) {
  const int taps = kTaps ? kTaps : count;
  __m256i low = _mm256_setzero_si256(), high = low;
  const __m256i none = low, origin = _mm256_set1_epi16(static_cast<int16_t>(zero));
#pragma GCC unroll 5
  for (int t = 0; t < taps; t += 2) {
    __m256i a = wide(at[t] + offset), b = t + 1 < taps ? wide(at[t + 1] + offset) : none;
    if constexpr (kZero) a = _mm256_sub_epi16(a, origin), b = _mm256_sub_epi16(b, origin);  // a weight of none is 0
    const auto* w = reinterpret_cast<const __m256i*>(weight + 16 * t);
    low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), _mm256_loadu_si256(w)));
    high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), _mm256_loadu_si256(w + 1)));
  }
  // Unpacking goes by halves of a register: channels 0-3 and 8-11 are in `low`.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums) + 1, _mm256_permute2x128_si256(low, high, 0x31));
}

#else

inline void woven(const uint8_t* weight, int taps, int64_t stride, int16_t* to) {
  for (int t = 0; t < taps; ++t)
    for (int i = 0; i < kChannels; ++i) to[kChannels * t + i] = static_cast<int8_t>(weight[t * stride + i]);
}
template <int kTaps, bool kZero>
inline void each_channel(const int8_t* const* at, int64_t offset, int count, const int16_t* weight, int32_t zero,
                         int32_t* sums) {
  const int taps = kTaps ? kTaps : count;
  for (int i = 0; i < kChannels; ++i) sums[i] = 0;
  for (int t = 0; t < taps; ++t)
    for (int i = 0; i < kChannels; ++i) sums[i] += (at[t][offset + i] - zero) * weight[kChannels * t + i];
}

#endif

}  // namespace bitfold
