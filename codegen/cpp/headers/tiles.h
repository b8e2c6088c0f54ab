// Products with many rows of x in tiles of AMX: 32 rows of the weight at a time, in bytes.
//
// Rows of decoded codes are tiles as they lie, and so is a panel of sixteen rows of x by fours (panels.h, tiled.h). Codes
// against codes: four tiles of sums, of 32 rows of the weight and 32 of x. Against x in digits: six, of 32 rows of the
// weight, 16 of x and three digits.
#pragma once
#include <cstdint>

#include "amx.h"
#include "transposed.h"

namespace bitfold {

constexpr int kHalf = kTileRows;      // rows of x, of the two times so many that `added` and `scaled_and_added` take
constexpr int kStored = 2 * kTileRows;  // rows of the weight that are decoded at a time
constexpr int kApart = kTileBytes;    // numbers between decoded rows: each begins a line of the cache
constexpr int kDeepest = 512;         // codes: so many of 32 rows take 18 KiB
constexpr bool kTiled = true;

constexpr int kEnds = kTileRows;      // rows of x whose sums are taken out of the way that they lie in at a time

// The tiles of a thread, `depth` products to a step: sums of codes, or of digits.
template <bool digits> struct Multiplier : Tiles {
  explicit Multiplier(int depth) : Tiles(digits ? 6 : 4, digits ? 7 : 6, depth) {}
};

template <int V, int depth>
inline void steps(Multiplier<false>& t, const uint8_t* w, int64_t stride, const int8_t* x, int64_t apart,
                  int64_t count) {
  for (int64_t k = 0; k < count; k += depth) {
    t.load<4>(w + k, stride);
    t.load<6>(x + k * kTileRows, kTileBytes);
    t.unsigned_codes<0, 4, 6>();
    t.load<5>(w + kTileRows * stride + k, stride);
    t.unsigned_codes<2, 5, 6>();
    if constexpr (V == 2) {
      t.load<7>(x + apart + k * kTileRows, kTileBytes);
      t.unsigned_codes<1, 4, 7>();
      t.unsigned_codes<3, 5, 7>();
    }
  }
}

// Stretches of 32 rows of codes and V panels of x, `apart` bytes from one to the next, scaled and added to float32 at
// `to`; see panels.h.
template <class D, int V, int depth, int stretch, int most, bool zeros>
inline void scaled_and_added(Multiplier<false>& t, const uint8_t* w, int64_t stride, const int8_t* x, int64_t apart,
                             const Stretches& of, int64_t, float* to, int64_t across) {
  alignas(64) int32_t sums[2 * kTileRows][V * kTileRows];
  for (int64_t i = 0; i < of.count; ++i) {
    const int32_t* const start = of.starts + i * 2 * kHalf;
    unrolled<4>([&](auto t_) { t.zero<t_.value>(); });
    steps<V, depth>(t, w + i * stretch, stride, x + i * stretch * kTileRows, apart, stretch);
    unrolled<2>([&](auto r) {
      unrolled<V>([&](auto v) { t.store<2 * r.value + v.value>(sums[kTileRows * r] + kTileRows * v, sizeof sums[0]); });
    });
    for (int r = 0; r < 2 * kTileRows; ++r)
      for (int v = 0; v < V; ++v) {
        const int at = v * kTileRows;
        const __m512i all = _mm512_add_epi32(_mm512_load_si512(sums[r] + at), _mm512_loadu_si512(start + at));
        Floats found = madd(_mm512_cvtepi32_ps(all), same(of.scales[r * most + i]), loadf(to + r * across + at));
        if (zeros && of.x_sums[i] != nullptr)
          found = madd(loadf(of.x_sums[i] + at), same(of.zeros[r * most + i]), found);
        storef(to + r * across + at, found);
      }
  }
}

// The same, added to int32 at `to`, in rows of `across`.
template <class D, int V, int depth>
inline void added(Multiplier<false>& t, const uint8_t* w, int64_t stride, const int8_t* x, int64_t apart, int64_t count,
                  float* to, int64_t across) {
  const int64_t row = across * int64_t(sizeof(float));
  const auto each = [&](auto&& use) {
    unrolled<2>([&](auto r) {
      unrolled<V>([&](auto v) { use(std::integral_constant<int, 2 * r.value + v.value>{},
                                    to + kTileRows * r * across + kTileRows * v); });
    });
  };
  each([&](auto i, float* at) { t.load<i.value>(at, row); });
  steps<V, depth>(t, w, stride, x, apart, count);
  each([&](auto i, float* at) { t.store<i.value>(at, row); });
}

// Sums of 32 rows of signed codes and a panel of x in digits, as floats in units of the codes: three tiles of digits
// each `depth` numbers, whose units are `units`. `use(r, sums)` has those of a row.
template <int depth, class Use>
inline void sums_of_digits(Multiplier<true>& t, const int8_t* w, int64_t stride, const int8_t* x, int64_t count,
                      const float* units, Use&& use) {
  constexpr int tile = depth * kTileRows;
  alignas(64) int32_t sums[6][kTileRows][kTileRows];
  unrolled<6>([&](auto i) { t.zero<i.value>(); });
  for (int64_t k = 0; k < count; k += depth, x += 3 * tile) {
    t.load<6>(w + k, stride);
    t.load<7>(x, kTileBytes);
    t.signed_codes<0, 6, 7>();
    t.load<7>(x + tile, kTileBytes);
    t.signed_codes<1, 6, 7>();
    t.load<7>(x + 2 * tile, kTileBytes);
    t.signed_codes<2, 6, 7>();
    t.load<6>(w + kTileRows * stride + k, stride);
    t.signed_codes<5, 6, 7>();
    t.load<7>(x + tile, kTileBytes);
    t.signed_codes<4, 6, 7>();
    t.load<7>(x, kTileBytes);
    t.signed_codes<3, 6, 7>();
  }
  unrolled<6>([&](auto i) { t.store<i.value>(sums[i], kTileBytes); });
  const Floats unit = loadf(units), byte = same(256.0f);
  for (int r = 0; r < 2 * kTileRows; ++r) {
    const auto digit = [&](int i) {  // below 2**24: exact
      return _mm512_cvtepi32_ps(_mm512_load_si512(sums[r / kTileRows * 3 + i][r % kTileRows]));
    };
    use(r, mul(madd(madd(digit(2), byte, digit(1)), byte, digit(0)), unit));
  }
}

}  // namespace bitfold
