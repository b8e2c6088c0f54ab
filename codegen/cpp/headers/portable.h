// The same vectors in plain C++: 32 bytes, 8 floats. Right everywhere; as fast as the compiler makes it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "eights_plain.h"

namespace bitfold {

constexpr int kFloats = 8;
constexpr int kInts = 8;
constexpr int kMostOfX = 4;  // rows of x that a few rows of the weight meet
constexpr int place(int i) { return 4 * (i % 8) + i / 8; }  // see avx2.h
struct Bytes {
  uint8_t v[32];
};
struct Floats {
  float v[8];
};
struct Ints {
  int32_t v[8];
};

inline Bytes load32(const uint8_t* p) {
  Bytes r;
  std::memcpy(r.v, p, 32);
  return r;
}
inline Bytes load16(const uint8_t* p) {
  Bytes r{};
  std::memcpy(r.v, p, 16);
  return r;
}
inline void store(uint8_t* p, Bytes a) { std::memcpy(p, a.v, 32); }
inline Bytes all(uint8_t v) {
  Bytes r;
  std::memset(r.v, v, 32);
  return r;
}
// Within each byte: what a wider shift would bring in from a neighbour is masked away by every program.
template <int n> inline Bytes shl(Bytes a) {
  for (auto& b : a.v) b = static_cast<uint8_t>(b << n);
  return a;
}
template <int n> inline Bytes shr(Bytes a) {
  for (auto& b : a.v) b = static_cast<uint8_t>(b >> n);
  return a;
}
inline Bytes and_(Bytes a, Bytes b) {
  for (int i = 0; i < 32; ++i) a.v[i] &= b.v[i];
  return a;
}
inline Bytes or_(Bytes a, Bytes b) {
  for (int i = 0; i < 32; ++i) a.v[i] |= b.v[i];
  return a;
}
inline Bytes xor_(Bytes a, Bytes b) {
  for (int i = 0; i < 32; ++i) a.v[i] ^= b.v[i];
  return a;
}
inline Bytes look_up(const int8_t* table, Bytes a) {
  for (auto& b : a.v) b = static_cast<uint8_t>(table[b & 15]);
  return a;
}

inline float of_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    magnitude = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
  }
  return h & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  const float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 6.103515625e-05f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f));
  const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

inline Floats zeros() { return Floats{}; }
inline Floats loadf(const float* p) {
  Floats r;
  std::memcpy(r.v, p, 32);
  return r;
}
inline void storef(float* p, Floats v) { std::memcpy(p, v.v, 32); }
inline Floats same(float v) {
  Floats r;
  for (auto& f : r.v) f = v;
  return r;
}
inline Floats mul(Floats a, Floats b) {
  for (int i = 0; i < 8; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Floats plus(Floats a, Floats b) {
  for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
  return a;
}
inline Floats madd(Floats a, Floats b, Floats c) {
  for (int i = 0; i < 8; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline float sum(Floats a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline void sum4(const Floats* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
}

using Held = Bytes;
inline Held held(Bytes v) { return v; }
constexpr float kHeld = 1.0f;
template <int part> inline Floats of_held(const Held& h) {
  Floats r;
  for (int i = 0; i < 8; ++i) r.v[i] = static_cast<int8_t>(h.v[4 * i + part]);
  return r;
}
template <int part> inline Floats of_integers(const uint8_t* p) {
  Floats r;
  for (int i = 0; i < 8; ++i) r.v[i] = static_cast<int8_t>(p[8 * part + i]);
  return r;
}
template <int part, int bits, int mantissa, bool nan> inline Floats of_floats(const uint8_t* p) {
  Floats r;
  for (int i = 0; i < 8; ++i) {
    const uint16_t code = p[8 * part + i];
    const uint16_t sign = (code & (1 << (bits - 1))) << (16 - bits);
    const uint16_t most = (1 << (bits - 1)) - 1, low = code & most;
    r.v[i] = of_half(sign | low << (10 - mantissa) | (nan && low == most ? 0x7e00 : 0));
  }
  return r;
}
template <int part, int bits> inline Floats of_table(const float* table, const uint8_t* p) {
  Floats r;
  for (int i = 0; i < 8; ++i) r.v[i] = table[p[8 * part + i]];
  return r;
}

template <class V> inline V in_register(V v) { return v; }  // see avx2.h
inline Ints no_ints() { return Ints{}; }
inline int32_t sum(Ints a) {
  int32_t r = 0;
  for (int32_t i : a.v) r += i;
  return r;
}
using Sums = Floats;  // as many as Ints
inline Sums no_sums() { return zeros(); }
inline Sums scaled(Ints v, float s, Sums onto) {
  for (int i = 0; i < 8; ++i) onto.v[i] += static_cast<float>(v.v[i]) * s;
  return onto;
}
inline Sums scaled(Ints v, Floats s, Sums onto) {
  for (int i = 0; i < 8; ++i) onto.v[i] += static_cast<float>(v.v[i]) * s.v[i];
  return onto;
}
template <int bits> inline Ints dot(Bytes codes, const int8_t* x, Ints onto) {
  for (int i = 0; i < 32; ++i) onto.v[i / 4] += int32_t(codes.v[i]) * int32_t(x[i]);
  return onto;
}


// Signed bytes times numbers of 16 bits, in words.py.
struct Words {
  int16_t v[16];
};
inline Words words(const uint8_t* p) {
  Words r;
  for (int i = 0; i < 16; ++i) r.v[i] = static_cast<int8_t>(p[i]);
  return r;
}
inline Ints products(Words w, const int16_t* x, Ints onto) {
  for (int i = 0; i < 16; ++i) onto.v[i / 2] += int32_t(w.v[i]) * int32_t(x[i]);
  return onto;
}

// For panels (panels.h); see avx2.h.
constexpr int kTile = 6;
inline Ints numbers(const void* x) {
  Ints r;
  std::memcpy(r.v, x, 32);
  return r;
}
inline void store_ints(void* to, Ints v) { std::memcpy(to, v.v, 32); }
inline Ints broadcast(const void* w) {
  Ints r;
  for (int32_t& i : r.v) std::memcpy(&i, w, 4);
  return r;
}
template <int bits> struct Deep {
  static constexpr int depth = 2, tile = 4, least = 9, runs = 1;
  using Number = int16_t;
  using Code = int16_t;
  static void put(Code* to, Bytes v) {
    for (int i = 0; i < 32; ++i) to[i] = v.v[i];
  }
  static Ints products(Ints codes, Ints x, Ints onto) {
    int16_t c[16], y[16];
    std::memcpy(c, codes.v, 32);
    std::memcpy(y, x.v, 32);
    for (int i = 0; i < 16; ++i) onto.v[i / 2] += int32_t(c[i]) * int32_t(y[i]);
    return onto;
  }
};
// Modulo 2**32: what is joined from digits may pass it on the way.
inline Ints add(Ints a, Ints b) {
  for (int i = 0; i < 8; ++i) a.v[i] = static_cast<int32_t>(uint32_t(a.v[i]) + uint32_t(b.v[i]));
  return a;
}
template <int n> inline Ints up(Ints a) {
  for (auto& i : a.v) i = static_cast<int32_t>(uint32_t(i) << n);
  return a;
}
inline Sums load_sums(const float* p) { return loadf(p); }
inline void store_sums(float* p, Sums v) { storef(p, v); }
inline Sums scaled(Sums v, float s, Sums onto) { return madd(v, same(s), onto); }

}  // namespace bitfold

#include "pairs32.h"
