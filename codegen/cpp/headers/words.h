// Products of signed bytes and numbers of 16 bits, summed by pairs in 32 bits; for AVX2 and AVX-512.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace bitfold {

using Words = __m256i;
// 16 bytes in memory, widened.
inline Words words(const uint8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i products(Words w, const int16_t* x, __m256i onto) {
  const __m256i given = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
#ifdef __AVX512VNNI__
  return _mm256_dpwssd_epi32(onto, w, given);
#else
  return _mm256_add_epi32(onto, _mm256_madd_epi16(w, given));
#endif
}

}  // namespace bitfold
