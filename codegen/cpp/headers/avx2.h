// Vectors for AVX2 with FMA and F16C: 32 bytes, 8 floats.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "eights.h"
#include "pairs16.h"
#include "words.h"

namespace bitfold {

constexpr int kFloats = 8;  // of a vector of floats; a vector of bytes has 32
constexpr int kInts = 8;    // of a vector of integers
constexpr int kMostOfX = 4;  // rows of x that a few rows of the weight meet
// In which order `of_held` gives the bytes of a vector: number i of its floats is byte place(i).
constexpr int place(int i) { return 4 * (i % 8) + i / 8; }
using Bytes = __m256i;
using Floats = __m256;
using Ints = __m256i;

inline Bytes load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes load16(const uint8_t* p) {
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes all(uint8_t v) { return _mm256_set1_epi8(static_cast<char>(v)); }
template <int n> inline Bytes shl(Bytes v) { return _mm256_slli_epi32(v, n); }
template <int n> inline Bytes shr(Bytes v) { return _mm256_srli_epi32(v, n); }
inline Bytes and_(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes or_(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes xor_(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
// The entry of a table of 16 for each byte, which is 0 to 15.
inline Bytes look_up(const int8_t* table, Bytes v) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), v);
}

inline void store(uint8_t* p, Bytes v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  // The compiler would keep the bytes in the register, and shuffle.
  asm("" : "+m"(*reinterpret_cast<uint8_t(*)[32]>(p)));
}
// Widening from memory costs one instruction, from a register two: a shuffle each, of which there is one a cycle.
template <int part> inline __m128i eighth(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * part));
}

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats loadf(const float* p) { return _mm256_loadu_ps(p); }
inline void storef(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats same(float v) { return _mm256_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats madd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Floats v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// The sums of four vectors.
inline void sum4(const Floats* v, float* out) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

// Bytes in a register as numbers, times 2**24: byte `part` of each group of four moves to the group's top, where
// its sign is. A shift and a mask are two of four instructions a cycle; widening shuffles, of which there is one.
using Held = Bytes;
inline Held held(Bytes v) { return v; }
constexpr float kHeld = 0x1p-24f;
template <int part> inline Floats of_held(Held v) {
  const __m256i moved = part == 3 ? v : _mm256_slli_epi32(v, 24 - 8 * part);
  return _mm256_cvtepi32_ps(part == 0 ? moved : _mm256_and_si256(moved, _mm256_set1_epi32(0xFF000000)));
}
// Bytes 8 * part .. 8 * part + 7 in memory, as numbers.
template <int part> inline Floats of_integers(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eighth<part>(p)));
}
// The same as small floats: the sign on top, the magnitude's `mantissa` last bits below the exponent's.
template <int part, int bits, int mantissa, bool nan> inline Floats of_floats(const uint8_t* p) {
  const __m128i wide = _mm_cvtepu8_epi16(eighth<part>(p));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(1 << (bits - 1))), 16 - bits);
  const __m128i most = _mm_set1_epi16((1 << (bits - 1)) - 1), low = _mm_and_si128(wide, most);
  __m128i rest = _mm_slli_epi16(low, 10 - mantissa);
  if constexpr (nan)  // the largest magnitude is none
    rest = _mm_or_si128(rest, _mm_and_si128(_mm_cmpeq_epi16(low, most), _mm_set1_epi16(0x7e00)));
  return _mm256_cvtph_ps(_mm_or_si128(sign, rest));
}
// The same as places of a table of floats.
template <int part, int bits> inline Floats of_table(const float* table, const uint8_t* p) {
  const __m256i at = _mm256_cvtepu8_epi32(eighth<part>(p));
  if constexpr (bits <= 3) return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
  if constexpr (bits == 4) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
  }
  return _mm256_i32gather_ps(table, at, 4);
}

// A value that the compiler keeps as it is: it neither reads memory again instead, nor sees that it equals another.
template <class V> inline V in_register(V v) {
  asm("" : "+x"(v));
  return v;
}

inline Ints no_ints() { return _mm256_setzero_si256(); }
using Sums = Floats;  // as many as Ints
inline Sums no_sums() { return zeros(); }
inline Sums scaled(Ints v, Floats s, Sums onto) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), s, onto); }
inline Sums scaled(Ints v, float s, Sums onto) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), same(s), onto); }
inline int32_t sum(Ints v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
inline Ints dot4(__m256i codes, __m256i x, Ints onto) {
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(onto, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// Products of 32 unsigned codes of `bits` bits and 32 signed numbers, added to 8 sums, exactly: two products
// of 7 and 8 bits fit in 16, two of 8 and 8 do not.
template <int bits> inline Ints dot(Bytes codes, const int8_t* x, Ints onto) {
  const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  if constexpr (bits <= 7) return dot4(codes, other, onto);
  const __m256i c0 = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes));
  const __m256i c1 = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes, 1));
  const __m256i x0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(other));
  const __m256i x1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(other, 1));
  return _mm256_add_epi32(onto, _mm256_add_epi32(_mm256_madd_epi16(c0, x0), _mm256_madd_epi16(c1, x1)));
}

// For panels (panels.h): some codes of a row, together with as many numbers of 8 rows of x. Codes of 8 bits are
// widened to 16, where no product saturates.
constexpr int kTile = 6;  // rows, with two vectors of sums each
// runs: steps whose products fit in 16 bits together; sums of those are widened after so many.
template <int bits> struct Deep {
  static constexpr int depth = bits < 8 ? 4 : 2, runs = bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
  // Rows of the weight, as products of integers need registers besides; rows of x from which on they are turned.
  static constexpr int tile = 4, least = bits < 8 ? 5 : 7;
  using Number = std::conditional_t<bits < 8, int8_t, int16_t>;
  using Code = std::conditional_t<bits < 8, uint8_t, int16_t>;
  static void put(Code* to, Bytes v) {
    __m256i* at = reinterpret_cast<__m256i*>(to);
    if constexpr (bits < 8) {
      _mm256_storeu_si256(at, v);
    } else {
      _mm256_storeu_si256(at, _mm256_cvtepu8_epi16(_mm256_castsi256_si128(v)));
      _mm256_storeu_si256(at + 1, _mm256_cvtepu8_epi16(_mm256_extracti128_si256(v, 1)));
    }
  }
  static Ints products(Ints codes, Ints x, Ints onto) {
    if constexpr (bits < 8) return dot4(codes, x, onto);
    return _mm256_add_epi32(onto, _mm256_madd_epi16(codes, x));
  }
  static Ints narrow(Ints codes, Ints x) { return _mm256_maddubs_epi16(codes, x); }
  static Ints narrow(Ints codes, Ints x, Ints onto) { return _mm256_add_epi16(onto, narrow(codes, x)); }
  static Ints widened(Ints n, Ints onto) { return _mm256_add_epi32(onto, _mm256_madd_epi16(n, _mm256_set1_epi16(1))); }
};
inline Ints numbers(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
inline void store_ints(void* to, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
inline Ints broadcast(const void* w) {
  int32_t some;
  __builtin_memcpy(&some, w, 4);
  return _mm256_set1_epi32(some);
}
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Sums load_sums(const float* p) { return _mm256_loadu_ps(p); }
inline void store_sums(float* p, Sums v) { _mm256_storeu_ps(p, v); }
inline Sums scaled(Sums v, float s, Sums onto) { return _mm256_fmadd_ps(v, same(s), onto); }

inline float of_half(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_half(float f) { return static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }

}  // namespace bitfold
