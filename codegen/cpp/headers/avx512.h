// Vectors for AVX-512 (F, BW, DQ, VL): 32 bytes, 16 floats; with VNNI, products of bytes in one instruction; with AMX,
// 16 x 16 sums of them (amx.h).
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "eights.h"
#include "words.h"

namespace bitfold {

constexpr int kFloats = 16;  // of a vector of floats; a vector of bytes has 32
constexpr int kInts = 8;    // of a vector of integers
constexpr int kMostOfX = 8;  // rows of x that a few rows of the weight meet, of up to 16 sums
constexpr int place(int i) { return i; }  // see avx2.h
using Bytes = __m256i;
using Floats = __m512;
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
inline Bytes look_up(const int8_t* table, Bytes v) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), v);
}

inline void store(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
template <int part> inline __m128i half(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * part));
}

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats loadf(const float* p) { return _mm512_loadu_ps(p); }
inline void storef(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats same(float v) { return _mm512_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats madd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
inline __m256 halved(Floats v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
inline void sum4(const __m256* v, float* out) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
inline void sum4(const Floats* v, float* out) {
  const __m256 halves[4] = {halved(v[0]), halved(v[1]), halved(v[2]), halved(v[3])};
  sum4(halves, out);
}

// Widening from memory is one instruction and a store for 32 bytes, and one for 16 numbers.
struct Held {
  alignas(32) uint8_t v[32];
};
inline Held held(Bytes v) {
  Held h;
  store(h.v, v);
  return h;
}
constexpr float kHeld = 1.0f;
template <int part> inline Floats of_held(const Held& h) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(half<part>(h.v)));
}

template <int part> inline Floats of_integers(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(half<part>(p)));
}
template <int part, int bits, int mantissa, bool nan> inline Floats of_floats(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(half<part>(p));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(1 << (bits - 1))), 16 - bits);
  const __m256i most = _mm256_set1_epi16((1 << (bits - 1)) - 1), low = _mm256_and_si256(wide, most);
  __m256i rest = _mm256_slli_epi16(low, 10 - mantissa);
  if constexpr (nan)  // the largest magnitude is none
    rest = _mm256_or_si256(rest, _mm256_and_si256(_mm256_cmpeq_epi16(low, most), _mm256_set1_epi16(0x7e00)));
  return _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
}
template <int part, int bits> inline Floats of_table(const float* table, const uint8_t* p) {
  const __m512i at = _mm512_cvtepu8_epi32(half<part>(p));
  if constexpr (bits <= 4) return _mm512_permutexvar_ps(at, _mm512_loadu_ps(table));
  return _mm512_i32gather_ps(at, table, 4);
}

// A value that the compiler keeps as it is: it neither reads memory again instead, nor sees that it equals another.
template <class V> inline V in_register(V v) {
  asm("" : "+v"(v));
  return v;
}

inline Ints no_ints() { return _mm256_setzero_si256(); }
using Sums = __m256;  // as many as Ints
inline Sums no_sums() { return _mm256_setzero_ps(); }
inline Sums scaled(Ints v, float s, Sums onto) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(s), onto);
}
inline float sum(Sums v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline int32_t sum(Ints v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}
// Four products of bytes each, added up in 32 bits; without VNNI in 16 first, where those of 7 and 8 bits fit.
inline Ints dot4(__m256i codes, __m256i x, Ints onto) {
#ifdef __AVX512VNNI__
  return _mm256_dpbusd_epi32(onto, codes, x);
#else
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(onto, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
template <int bits> inline Ints dot(Bytes codes, const int8_t* x, Ints onto) {
  const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
#ifndef __AVX512VNNI__
  if constexpr (bits == 8) {
    const __m512i c = _mm512_cvtepu8_epi16(codes), x16 = _mm512_cvtepi8_epi16(other);
    const __m512i four = _mm512_madd_epi16(c, x16);
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    return _mm256_add_epi32(onto, two);
  }
#endif
  return dot4(codes, other, onto);
}

// For panels (panels.h); see avx2.h.
#ifdef BITFOLD_TILES
constexpr int kTile = 8;
#else
constexpr int kTile = 12;
#endif
#ifdef __AVX512VNNI__
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif
template <int bits> struct Deep {
  static constexpr bool bytes = kVnni || bits < 8;
  static constexpr int depth = bytes ? 4 : 2;
#ifdef BITFOLD_TILES
  static constexpr int tile = 2 * kTileRows, least = 9, runs = 1;
#else
  static constexpr int tile = 12, least = bits < 8 ? 5 : 9;
  static constexpr int runs = kVnni || bits > 6 ? 1 : bits <= 4 ? 8 : bits == 5 ? 4 : 2;
#endif
  using Number = std::conditional_t<bytes, int8_t, int16_t>;
  using Code = std::conditional_t<bytes, uint8_t, int16_t>;
  static void put(Code* to, Bytes v) {
    if constexpr (bytes)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
    else
      _mm512_storeu_si512(to, _mm512_cvtepu8_epi16(v));
  }
  static Ints products(Ints codes, Ints x, Ints onto) {
    if constexpr (bytes) return dot4(codes, x, onto);
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
inline Sums scaled(Sums v, float s, Sums onto) { return _mm256_fmadd_ps(v, _mm256_set1_ps(s), onto); }

#ifdef __AVX512VNNI__
template <int n> inline Ints up(Ints v) { return _mm256_slli_epi32(v, n); }
#endif

inline float of_half(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t to_half(float f) { return static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }

}  // namespace bitfold

#ifdef __AVX512VNNI__
#include "pairs32.h"
#else
#include "pairs16.h"
#endif
