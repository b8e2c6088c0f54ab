// Products of codes of up to 7 bits and signed bytes, summed by pairs in 16 bits; for AVX2 and AVX-512 without VNNI.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace bitfold {

using Pairs = __m256i;
inline Pairs pairs(__m256i codes, const int8_t* x) {
  return _mm256_maddubs_epi16(codes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Pairs pairs(__m256i codes, const int8_t* x, Pairs onto) {
  Pairs sum = _mm256_add_epi16(onto, pairs(codes, x));
  asm("" : "+x"(sum));  // GCC would add up at the end of a block, and keep all products in memory until then
  return sum;
}
// Sums for three digits, lowest first, joined: exact where the result fits, whatever passes 32 bits on the way.
inline __m256i joined(Pairs a, Pairs b, Pairs c, const int32_t* onto) {
  const __m256i low = _mm256_madd_epi16(a, _mm256_set1_epi16(1)), mid = _mm256_madd_epi16(b, _mm256_set1_epi16(256));
  const __m256i high = _mm256_slli_epi32(_mm256_madd_epi16(c, _mm256_set1_epi16(1)), 16);
  const __m256i given = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(onto));
  return _mm256_add_epi32(_mm256_add_epi32(low, mid), _mm256_add_epi32(high, given));
}

}  // namespace bitfold
