// Vectors for NEON (AArch64): 32 bytes, 8 floats; with the dot product extension, products of bytes by fours.
#pragma once
#include <cstdint>
#include <arm_neon.h>

#include "eights_plain.h"

namespace bitfold {

constexpr int kFloats = 8;
constexpr int kInts = 8;
constexpr int kMostOfX = 4;  // rows of x that a few rows of the weight meet
constexpr int place(int i) { return i; }  // see avx2.h
struct Bytes {
  uint8x16_t a, b;
};
struct Floats {
  float32x4_t a, b;
};
struct Ints {
  int32x4_t a, b;
};

inline Bytes load32(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
inline Bytes load16(const uint8_t* p) { return {vld1q_u8(p), vdupq_n_u8(0)}; }
inline Bytes all(uint8_t v) { return {vdupq_n_u8(v), vdupq_n_u8(v)}; }
template <int n> inline Bytes shl(Bytes v) { return {vshlq_n_u8(v.a, n), vshlq_n_u8(v.b, n)}; }
template <int n> inline Bytes shr(Bytes v) { return {vshrq_n_u8(v.a, n), vshrq_n_u8(v.b, n)}; }
inline Bytes and_(Bytes x, Bytes y) { return {vandq_u8(x.a, y.a), vandq_u8(x.b, y.b)}; }
inline Bytes or_(Bytes x, Bytes y) { return {vorrq_u8(x.a, y.a), vorrq_u8(x.b, y.b)}; }
inline Bytes xor_(Bytes x, Bytes y) { return {veorq_u8(x.a, y.a), veorq_u8(x.b, y.b)}; }
inline Bytes look_up(const int8_t* table, Bytes v) {
  const uint8x16_t t = vreinterpretq_u8_s8(vld1q_s8(table));
  return {vqtbl1q_u8(t, v.a), vqtbl1q_u8(t, v.b)};
}
inline void store(uint8_t* p, Bytes v) { vst1q_u8(p, v.a), vst1q_u8(p + 16, v.b); }
template <int part> inline uint8x8_t eighth(const uint8_t* p) { return vld1_u8(p + 8 * part); }

inline Floats zeros() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
inline Floats loadf(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void storef(float* p, Floats v) { vst1q_f32(p, v.a), vst1q_f32(p + 4, v.b); }
inline Floats same(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
inline Floats mul(Floats x, Floats y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline Floats plus(Floats x, Floats y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline Floats madd(Floats x, Floats y, Floats z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
inline float sum(Floats v) { return vaddvq_f32(vaddq_f32(v.a, v.b)); }
inline void sum4(const Floats* v, float* out) {
  float32x4_t s[4];
  for (int i = 0; i < 4; ++i) s[i] = vaddq_f32(v[i].a, v[i].b);
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3])));
}

inline Floats of_eight(uint8x8_t v) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(v));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}
using Held = Bytes;
inline Held held(Bytes v) { return v; }
constexpr float kHeld = 1.0f;
template <int part> inline Floats of_held(Held v) {
  const uint8x16_t half = part < 2 ? v.a : v.b;
  return of_eight(part % 2 ? vget_high_u8(half) : vget_low_u8(half));
}
template <int part> inline Floats of_integers(const uint8_t* p) { return of_eight(eighth<part>(p)); }
template <int part, int bits, int mantissa, bool nan> inline Floats of_floats(const uint8_t* p) {
  const uint16x8_t wide = vmovl_u8(eighth<part>(p));
  const uint16x8_t sign = vshlq_n_u16(vandq_u16(wide, vdupq_n_u16(1 << (bits - 1))), 16 - bits);
  const uint16x8_t most = vdupq_n_u16((1 << (bits - 1)) - 1), low = vandq_u16(wide, most);
  uint16x8_t rest = vshlq_n_u16(low, 10 - mantissa);
  if constexpr (nan) rest = vorrq_u16(rest, vandq_u16(vceqq_u16(low, most), vdupq_n_u16(0x7e00)));
  const float16x8_t h = vreinterpretq_f16_u16(vorrq_u16(sign, rest));
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_f32_f16(vget_high_f16(h))};
}
template <int part, int bits> inline Floats of_table(const float* table, const uint8_t* p) {
  float found[8];
  for (int i = 0; i < 8; ++i) found[i] = table[p[8 * part + i]];
  return loadf(found);
}

template <class V> inline V in_register(V v) { return v; }  // see avx2.h
inline Ints no_ints() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline int32_t sum(Ints v) { return vaddvq_s32(vaddq_s32(v.a, v.b)); }
using Sums = Floats;  // as many as Ints
inline Sums no_sums() { return zeros(); }
inline Sums scaled(Ints v, float s, Sums onto) {
  return madd({vcvtq_f32_s32(v.a), vcvtq_f32_s32(v.b)}, same(s), onto);
}
// Codes of 8 bits are no signed bytes: as 128 less, with 128 times the sum of x beside them.
template <int bits> inline Ints dot(Bytes codes, const int8_t* x, Ints onto) {
  const int8x16_t x0 = vld1q_s8(x), x1 = vld1q_s8(x + 16);
  const uint8x16_t flip = vdupq_n_u8(bits == 8 ? 0x80 : 0);
  const int8x16_t c0 = vreinterpretq_s8_u8(veorq_u8(codes.a, flip));
  const int8x16_t c1 = vreinterpretq_s8_u8(veorq_u8(codes.b, flip));
#ifdef __ARM_FEATURE_DOTPROD
  onto = {vdotq_s32(onto.a, c0, x0), vdotq_s32(onto.b, c1, x1)};
  if (bits == 8) {
    const int8x16_t some = vdupq_n_s8(64);  // 128 is no signed byte: 64 twice
    onto = {vdotq_s32(vdotq_s32(onto.a, some, x0), some, x0), vdotq_s32(vdotq_s32(onto.b, some, x1), some, x1)};
  }
  return onto;
#else
  const auto four = [bits_of = bits](int8x16_t c, int8x16_t y, int32x4_t s) {
    s = vpadalq_s16(s, vmull_s8(vget_low_s8(c), vget_low_s8(y)));
    s = vpadalq_s16(s, vmull_s8(vget_high_s8(c), vget_high_s8(y)));
    if (bits_of == 8) s = vaddq_s32(s, vshlq_n_s32(vpaddlq_s16(vpaddlq_s8(y)), 7));
    return s;
  };
  return {four(c0, x0, onto.a), four(c1, x1, onto.b)};
#endif
}

// For panels (panels.h); see avx2.h.
constexpr int kTile = 6;
// As bytes: what lies there is int16 too, or sums that are floats later.
inline Ints numbers(const void* x) {
  const auto* from = static_cast<const uint8_t*>(x);
  return {vreinterpretq_s32_u8(vld1q_u8(from)), vreinterpretq_s32_u8(vld1q_u8(from + 16))};
}
inline void store_ints(void* to, Ints v) {
  auto* bytes = static_cast<uint8_t*>(to);
  vst1q_u8(bytes, vreinterpretq_u8_s32(v.a)), vst1q_u8(bytes + 16, vreinterpretq_u8_s32(v.b));
}
inline Ints broadcast(const void* w) {
  int32_t two;
  __builtin_memcpy(&two, w, 4);
  return {vdupq_n_s32(two), vdupq_n_s32(two)};
}
inline int32x4_t pairs(int32x4_t codes, int32x4_t x, int32x4_t onto) {
  const int16x8_t c = vreinterpretq_s16_s32(codes), y = vreinterpretq_s16_s32(x);
  const int32x4_t low = vmull_s16(vget_low_s16(c), vget_low_s16(y)), high = vmull_high_s16(c, y);
  return vaddq_s32(onto, vpaddq_s32(low, high));
}
template <int bits> struct Deep {
  static constexpr int depth = 2, tile = 6, least = 9, runs = 1;
  using Number = int16_t;
  using Code = int16_t;
  static void put(Code* to, Bytes v) {
    vst1q_s16(to, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v.a))));
    vst1q_s16(to + 8, vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(v.a))));
    vst1q_s16(to + 16, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v.b))));
    vst1q_s16(to + 24, vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(v.b))));
  }
  static Ints products(Ints codes, Ints x, Ints onto) {
    return {pairs(codes.a, x.a, onto.a), pairs(codes.b, x.b, onto.b)};
  }
};
inline Ints add(Ints x, Ints y) { return {vaddq_s32(x.a, y.a), vaddq_s32(x.b, y.b)}; }
inline Sums load_sums(const float* p) { return loadf(p); }
inline void store_sums(float* p, Sums v) { storef(p, v); }
inline Sums scaled(Sums v, float s, Sums onto) { return madd(v, same(s), onto); }

// Signed bytes times numbers of 16 bits, in words.py: which products share a sum is all the same.
struct Words {
  int16x8_t a, b;
};
inline Words words(const uint8_t* p) {
  const int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(p));
  return {vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v)};
}
inline Ints products(Words w, const int16_t* x, Ints onto) {
  const int16x8_t x0 = vld1q_s16(x), x1 = vld1q_s16(x + 8);
  return {vmlal_high_s16(vmlal_s16(onto.a, vget_low_s16(w.a), vget_low_s16(x0)), w.a, x0),
          vmlal_high_s16(vmlal_s16(onto.b, vget_low_s16(w.b), vget_low_s16(x1)), w.b, x1)};
}

template <int n> inline Ints up(Ints v) { return {vshlq_n_s32(v.a, n), vshlq_n_s32(v.b, n)}; }

inline float of_half(uint16_t h) {
  float16_t f;
  __builtin_memcpy(&f, &h, 2);
  return static_cast<float>(f);
}
inline uint16_t to_half(float f) {
  const float16_t h = static_cast<float16_t>(f);
  uint16_t bits;
  __builtin_memcpy(&bits, &h, 2);
  return bits;
}

}  // namespace bitfold

#include "pairs32.h"
