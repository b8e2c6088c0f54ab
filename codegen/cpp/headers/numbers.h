// Stored numbers as float32, and float32 as what is stored; what the body of a kernel is written with. Stands behind
// VECTORS, which has half floats.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "functions.h"

namespace bitfold {

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
struct f32 {
  using type = float;
  static float get(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
  static void put(void* p, int64_t i, float f) { static_cast<float*>(p)[i] = f; }
};
struct bf16 {
  static float get(const void* p, int64_t i) { return from_bits(uint32_t(static_cast<const uint16_t*>(p)[i]) << 16); }
  static void put(void* p, int64_t i, float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(f == f ? rounded : 0x7fc0);
  }
};
struct f16 {
  static float get(const void* p, int64_t i) { return of_half(static_cast<const uint16_t*>(p)[i]); }
  static void put(void* p, int64_t i, float f) { static_cast<uint16_t*>(p)[i] = to_half(f); }
};
inline uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
// Without branches, for eights_plain.h; AVX2 and AVX-512 have eights.h.
struct e8m0 {  // 2**(byte - 127); 255 is NaN
  static float get(const void* p, int64_t i) {
    const uint32_t byte = static_cast<const uint8_t*>(p)[i];
    const uint32_t bits = byte == 0 ? 0x00400000u : byte << 23;
    return from_bits(byte == 255 ? 0x7fc00000u : bits);
  }
};
struct e4m3 {
  static float get(const void* p, int64_t i) {
    const uint32_t byte = static_cast<const uint8_t*>(p)[i], rest = byte & 127;
    const uint32_t small = to_bits(static_cast<float>(static_cast<int32_t>(rest)) * 0.001953125f);
    const uint32_t bits = rest < 8 ? small : (rest << 20) + (120u << 23);
    return from_bits((rest == 127 ? 0x7fc00000u : bits) | (byte & 128) << 24);
  }
};
struct i8 {
  static float get(const void* p, int64_t i) { return static_cast<const int8_t*>(p)[i]; }
};
struct u8 {
  static float get(const void* p, int64_t i) { return static_cast<const uint8_t*>(p)[i]; }
};

// f(0), f(1), .. f(count - 1), each number a constant. Always inline: GCC 13 made a function of two dozen products, whose
// sums lay in memory from one step to the next.
template <int... i, class F> [[gnu::always_inline]] inline void each(std::integer_sequence<int, i...>, F&& f) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int count, class F> [[gnu::always_inline]] inline void unrolled(F&& f) {
  each(std::make_integer_sequence<int, count>{}, static_cast<F&&>(f));
}

// Asks for the line of the cache at p, which may be no memory.
constexpr int kLine = 64;
inline void ahead(const void* p) { __builtin_prefetch(p); }

// An address that the compiler takes as it is, without adding its own from what it was made of.
template <class T> inline T* one_address(T* p) {
  asm("" : "+r"(p));
  return p;
}

// What so many rows use: loaded once for all of them.
template <int rows> inline Floats shared(Floats v) { return rows > 1 ? in_register(v) : v; }

inline float dotted(const float* a, const float* b, int64_t count) {
  Floats all = zeros();
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) all = madd(loadf(a + i), loadf(b + i), all);
  float rest = sum(all);
  for (; i < count; ++i) rest += a[i] * b[i];
  return rest;
}

// out[i]: the sum of vector i.
template <int count, class V> inline void added_up(const V* v, float* out) {
  int i = 0;
  for (; i + 4 <= count; i += 4) sum4(v + i, out + i);
  for (; i < count; ++i) out[i] = sum(v[i]);
}

}  // namespace bitfold
