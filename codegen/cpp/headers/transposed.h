// Sixteen rows of sixteen numbers of 32 bits, or eight of eight, turned: number c of row r becomes number r of row c.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bitfold {

// from, to: rows so many bytes apart.
inline void transposed(const void* from, int64_t from_row, void* to, int64_t to_row) {
  const auto* at = static_cast<const char*>(from);
  auto* const put = static_cast<char*>(to);
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(at + r * from_row);
  // Numbers by twos, then by fours, within each quarter of a register; then quarters.
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  // a[4 g + c], quarter q: column 4 q + c of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), low_odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD);
    const __m512i high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_si512(put + c * to_row, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(put + (8 + c) * to_row, _mm512_shuffle_i32x4(low, high, 0xDD));
    _mm512_storeu_si512(put + (4 + c) * to_row, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(put + (12 + c) * to_row, _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
  }
#else
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) std::memcpy(put + c * to_row + 4 * r, at + r * from_row + 4 * c, 4);
#endif
}

// The same of eight.
inline void transposed8(const void* from, int64_t from_row, void* to, int64_t to_row) {
  const auto* at = static_cast<const char*>(from);
  auto* const put = static_cast<char*>(to);
#if defined(__AVX2__)
  // Quarters of rows r and r + 4 side by side, so that no number has to cross from half to half later.
  for (int side = 0; side < 2; ++side) {
    __m256 a[4], b[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const char* const quarter = at + r * from_row + 16 * side;
      a[r] = _mm256_castps128_ps256(_mm_loadu_ps(reinterpret_cast<const float*>(quarter)));
      a[r] = _mm256_insertf128_ps(a[r], _mm_loadu_ps(reinterpret_cast<const float*>(quarter + 4 * from_row)), 1);
    }
    b[0] = _mm256_unpacklo_ps(a[0], a[1]), b[1] = _mm256_unpackhi_ps(a[0], a[1]);
    b[2] = _mm256_unpacklo_ps(a[2], a[3]), b[3] = _mm256_unpackhi_ps(a[2], a[3]);
    const auto store = [&](int c, __m256 v) {
      _mm256_storeu_ps(reinterpret_cast<float*>(put + (4 * side + c) * to_row), v);
    };
    store(0, _mm256_shuffle_ps(b[0], b[2], 0x44)), store(1, _mm256_shuffle_ps(b[0], b[2], 0xEE));
    store(2, _mm256_shuffle_ps(b[1], b[3], 0x44)), store(3, _mm256_shuffle_ps(b[1], b[3], 0xEE));
  }
#else
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) std::memcpy(put + c * to_row + 4 * r, at + r * from_row + 4 * c, 4);
#endif
}

}  // namespace bitfold
