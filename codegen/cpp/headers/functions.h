// What epilogues compute besides arithmetic, without branches or calls, so that a compiler makes vectors of loops over
// them. Errors are relative; NaN stays NaN, infinities have the limits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace bitfold {

// 2**n for n from -126 to 127.
inline float power_of_two(int32_t n) {
  const int32_t bits = (n + 127) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// e**x within 2 units of the last place: 2**n e**r, where |r| <= log(2) / 2, whose series ends below 2**-27 of it. Two
// halves of n, since results below 2**-126 and above 2**127 have no power of two.
inline float exponential(float x) {
  const float kept = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
  const float moved = kept * 1.44269504f + 12582912.0f;  // rounds: its last bits are those of n
  const float n = moved - 12582912.0f;
  const float r = kept - n * 0.693359375f + n * 2.12194440e-4f;  // log(2) in two parts, the first times n is exact
  float series = 1.0f + r * (1.0f / 7.0f);
  series = 1.0f + r * (1.0f / 6.0f) * series;
  series = 1.0f + r * (1.0f / 5.0f) * series;
  series = 1.0f + r * (1.0f / 4.0f) * series;
  series = 1.0f + r * (1.0f / 3.0f) * series;
  series = 1.0f + r * (1.0f / 2.0f) * series;
  series = 1.0f + r * series;
  int32_t whole;
  std::memcpy(&whole, &moved, 4);
  whole = kept == kept ? whole - 0x4B400000 : 0;
  const int32_t half = whole >> 1;
  return series * power_of_two(half) * power_of_two(whole - half);
}

// Within 4 units of the last place: by its series where the quotient cancels.
inline float hyperbolic_tangent(float x) {
  const float magnitude = std::fabs(x), square = x * x;
  const float falling = exponential(-2.0f * magnitude);
  const float far = std::copysign((1.0f - falling) / (1.0f + falling), x);
  float near = 62.0f / 2835.0f - square * (1382.0f / 155925.0f);
  near = 17.0f / 315.0f - square * near;
  near = 2.0f / 15.0f - square * near;
  near = 1.0f / 3.0f - square * near;
  return magnitude < 0.3f ? x - x * square * near : far;
}

}  // namespace bitfold
