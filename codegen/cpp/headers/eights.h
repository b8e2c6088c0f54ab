// Eight stored numbers as float32, for AVX2 and AVX-512: what `get` of numbers.h makes of each. GCC makes no vectors of
// loops over scales of a byte.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace bitfold {

struct f32;
struct bf16;
struct f16;
struct e8m0;
struct e4m3;
struct i8;
struct u8;

inline __m128i eight_bytes(const void* p, int64_t i) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(p) + i));
}
inline __m128i eight_halves(const void* p, int64_t i) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
}

// Numbers i .. i + 7 at p.
template <class T> void eight(const void* p, int64_t i, float* to);

template <> inline void eight<f32>(const void* p, int64_t i, float* to) {
  _mm256_storeu_ps(to, _mm256_loadu_ps(static_cast<const float*>(p) + i));
}
template <> inline void eight<bf16>(const void* p, int64_t i, float* to) {
  const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight_halves(p, i)), 16);
  _mm256_storeu_ps(to, _mm256_castsi256_ps(wide));
}
template <> inline void eight<f16>(const void* p, int64_t i, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(eight_halves(p, i)));
}
template <> inline void eight<e8m0>(const void* p, int64_t i, float* to) {
  const __m256i byte = _mm256_cvtepu8_epi32(eight_bytes(p, i));
  const __m256i least = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
  const __m256i none = _mm256_cmpeq_epi32(byte, _mm256_set1_epi32(255));
  // 2**-127 is half of the smallest exponent; 255 << 23 is infinity, and with the bit below it no number.
  const __m256i small = _mm256_and_si256(least, _mm256_set1_epi32(0x00400000));
  const __m256i quiet = _mm256_and_si256(none, _mm256_set1_epi32(0x00400000));
  const __m256i bits = _mm256_or_si256(_mm256_slli_epi32(byte, 23), _mm256_or_si256(small, quiet));
  _mm256_storeu_ps(to, _mm256_castsi256_ps(bits));
}
template <> inline void eight<e4m3>(const void* p, int64_t i, float* to) {
  const __m128i wide = _mm_cvtepu8_epi16(eight_bytes(p, i));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(128)), 8);
  const __m128i rest = _mm_and_si128(wide, _mm_set1_epi16(127));
  const __m128i none = _mm_and_si128(_mm_cmpeq_epi16(rest, _mm_set1_epi16(127)), _mm_set1_epi16(0x7e00));
  // A float16 whose exponent is 8 less.
  const __m128i half = _mm_or_si128(_mm_or_si128(sign, none), _mm_slli_epi16(rest, 7));
  _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f)));
}
template <> inline void eight<i8>(const void* p, int64_t i, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p, i))));
}
template <> inline void eight<u8>(const void* p, int64_t i, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes(p, i))));
}

}  // namespace bitfold
