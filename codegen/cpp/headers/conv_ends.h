// The ends of sums in registers: eight or sixteen of a pixel's numbers at once, where an epilogue is arithmetic.
//
//   numbers(sums) * numbers(factors) + numbers(bias)   Floats, on which + - * are the compiler's own
//   within(v, low, high)        NaN stays
//   keep(v, to), coded(v, ..)   kParts of them are the sixteen channels of a panel
//
// What has functions in it goes the way of loops over arrays (`conv_lanes.h`), as everything does without AVX2.
#pragma once
#include "conv_lanes.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#define BITFOLD_FLOATS
namespace bitfold {

using Floats = __m512;
constexpr int kAtOnce = 16, kParts = 1;

inline Floats each(float v) { return _mm512_set1_ps(v); }
inline Floats numbers(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
inline Floats numbers(const float* p) { return _mm512_loadu_ps(p); }
inline Floats numbers(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats least(Floats bound, Floats v) { return _mm512_min_ps(bound, v); }  // NaN in v stays
inline Floats most(Floats bound, Floats v) { return _mm512_max_ps(bound, v); }
inline __m512i whole(Floats v) { return _mm512_cvtps_epi32(v); }
inline __m512i whole_or_0(Floats v) { return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v); }
inline __m512i more(__m512i v, int32_t zero) { return _mm512_add_epi32(v, _mm512_set1_epi32(zero)); }
inline __m512i or_0(__m512i v, Floats of) {
  return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(of, of, _CMP_ORD_Q), v);
}
inline void keep(Floats v, float* to) { _mm512_storeu_ps(to, v); }
template <int parts> inline void saturated(const __m512i* v, int8_t* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(v[0]));
}
using Whole = __m512i;

}  // namespace bitfold

#elif defined(__AVX2__)

#define BITFOLD_FLOATS
namespace bitfold {

using Floats = __m256;
constexpr int kAtOnce = 8, kParts = 2;

inline Floats each(float v) { return _mm256_set1_ps(v); }
inline Floats numbers(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats numbers(const float* p) { return _mm256_loadu_ps(p); }
inline Floats numbers(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats least(Floats bound, Floats v) { return _mm256_min_ps(bound, v); }
inline Floats most(Floats bound, Floats v) { return _mm256_max_ps(bound, v); }
inline __m256i or_0(__m256i v, Floats of) {
  return _mm256_and_si256(v, _mm256_castps_si256(_mm256_cmp_ps(of, of, _CMP_ORD_Q)));
}
inline __m256i whole(Floats v) { return _mm256_cvtps_epi32(v); }
inline __m256i whole_or_0(Floats v) { return or_0(whole(v), v); }
inline __m256i more(__m256i v, int32_t zero) { return _mm256_add_epi32(v, _mm256_set1_epi32(zero)); }
inline void keep(Floats v, float* to) { _mm256_storeu_ps(to, v); }
template <int parts> inline void saturated(const __m256i* v, int8_t* to) {
  if constexpr (parts == 2) return packed(v, to);
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(v[0]), _mm256_extracti128_si256(v[0], 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(pairs, pairs));
}
using Whole = __m256i;

}  // namespace bitfold

#endif

#if defined(BITFOLD_FLOATS)

namespace bitfold {

inline Floats within(Floats v, float low, float high) { return least(each(high), most(each(low), v)); }

template <int parts> inline void kept(const Floats* v, float* to) {
  for (int h = 0; h < parts; ++h) keep(v[h], to + h * kAtOnce);
}

// As `codes` of `conv_lanes.h`, to the bit.
template <int parts> inline void coded(const Floats* v, float inverse, int8_t* to) {
  Whole found[parts];
  for (int h = 0; h < parts; ++h) found[h] = whole_or_0(least(each(127.0f), v[h] * each(inverse)));
  saturated<parts>(found, to);
}
template <int parts> inline void coded(const Floats* v, float inverse, int32_t zero, int8_t* to) {
  Whole found[parts];
  for (int h = 0; h < parts; ++h) {
    const Floats scaled = v[h] * each(inverse), near = most(each(-kFar), least(each(kFar), scaled));
    found[h] = or_0(more(whole(near), zero), scaled);
  }
  saturated<parts>(found, to);
}
// Of numbers that are to be kept to 0 .. high first: bounds move past a factor that is not negative, so `top` is
// high * inverse, or 127. NaN, the first operand of `max` here, becomes 0.
template <int parts> inline void coded_from_0(const Floats* v, float inverse, float top, int8_t* to) {
  Whole found[parts];
  for (int h = 0; h < parts; ++h) found[h] = whole(least(each(top), most(v[h] * each(inverse), each(0.0f))));
  saturated<parts>(found, to);
}
inline float top_of(float high, float inverse) { return high * inverse < 127.0f ? high * inverse : 127.0f; }

}  // namespace bitfold

#endif
