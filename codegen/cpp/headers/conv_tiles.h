// Convolutions in tiles of AMX: 32 pixels of the result by 32 rows of the weight, all taps and channels.
//
// A panel of the weight is [taps and channels by fours][16 rows][4], so sixteen of its fours are a tile as they lie. Pixels
// are rows of bytes: those of a product, or of a kernel of one tap, as they lie too; others are gathered, each tap's channels
// behind those of the one before, once for all panels. Codes are multiplied with their signs; the zero point times the
// weight's sum is what sums begin with.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "amx.h"
#include "conv_lanes.h"

#if defined(BITFOLD_TILES)

namespace bitfold {

// Fours of a step, which divide all of them: 0 where that leaves a tile next to empty.
inline int64_t fours_of_step(int64_t fours) {
  for (int64_t step = kTileRows; step >= 4; --step)
    if (fours % step == 0) return step;
  return 0;
}

// One pixel's channels of each tap, side by side; a masked load reads nothing behind the last.
inline void gathered(const int8_t* const* at, int64_t taps, int64_t offset, int64_t bytes, int8_t* to) {
  const int64_t whole = bytes / kTileBytes * kTileBytes;
  const __mmask64 rest = (uint64_t(1) << (bytes - whole)) - 1;
  for (int64_t tap = 0; tap < taps; ++tap, to += bytes) {
    const int8_t* from = at[tap] + offset;
    for (int64_t i = 0; i < whole; i += kTileBytes) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    _mm512_mask_storeu_epi8(to + whole, rest, _mm512_maskz_loadu_epi8(rest, from + whole));
  }
}

// What the sums of a panel begin with.
inline void begun(const uint8_t* panel, int64_t fours, int32_t zero, int32_t* to) {
  __m512i sums = _mm512_setzero_si512();
  if (zero != 0)
    for (int64_t i = 0; i < fours; ++i)
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(panel + i * kTileBytes));
  _mm512_storeu_si512(to, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-zero)));
}

// Sums of 16 * down pixels, rows of x `stride` bytes apart, and `across` panels.
template <int down, int across>
inline void sums_of_tiles(Tiles& t, const int8_t* x, int64_t stride, const uint8_t* w0, const uint8_t* w1, int64_t fours,
                          int64_t step, const int32_t* begin, int32_t (*sums)[2][kChannels][kChannels]) {
  t.load<0>(begin, 0);
  if constexpr (across == 2) t.load<1>(begin + kChannels, 0);
  if constexpr (down == 2) t.load<2>(begin, 0);
  if constexpr (down == 2 && across == 2) t.load<3>(begin + kChannels, 0);
  for (int64_t i = 0; i < fours; i += step) {
    t.load<4>(x + 4 * i, stride);
    t.load<6>(w0 + i * kTileBytes, kTileBytes);
    t.signed_codes<0, 4, 6>();
    if constexpr (across == 2) t.load<7>(w1 + i * kTileBytes, kTileBytes), t.signed_codes<1, 4, 7>();
    if constexpr (down == 2) t.load<5>(x + kTileRows * stride + 4 * i, stride), t.signed_codes<2, 5, 6>();
    if constexpr (down == 2 && across == 2) t.signed_codes<3, 5, 7>();
  }
  t.store<0>(sums[0][0], kTileBytes);
  if constexpr (across == 2) t.store<1>(sums[0][1], kTileBytes);
  if constexpr (down == 2) t.store<2>(sums[1][0], kTileBytes);
  if constexpr (down == 2 && across == 2) t.store<3>(sums[1][1], kTileBytes);
}

// `gemm` of conv.h. C: `Conv`; P: `Places`.
template <class C, class P, class End>
inline void gemm_in_tiles(const C& c, int64_t first, int64_t last, int64_t from, int64_t to, int64_t step) {
  constexpr int most = 2 * kTileRows;
  const int64_t taps = c.taps(), bytes = (c.depth + 3) / 4 * 4, fours = taps * bytes / 4, each = c.panels_of_group();
  const int64_t stride = (4 * fours + kTileBytes - 1) / kTileBytes * kTileBytes + kTileBytes;
  thread_local std::vector<const int8_t*> at;
  thread_local std::vector<int8_t> held;
  thread_local std::vector<int32_t> begins;
  at.resize(most * taps), held.resize(most * stride + kTileBytes), begins.resize((to - from) * kChannels);
  int8_t* const rows = held.data() + (kTileBytes - reinterpret_cast<uintptr_t>(held.data()) % kTileBytes);
  for (int64_t p = from; p < to; ++p) begun(c.panels[p], fours, c.zero, begins.data() + (p - from) * kChannels);
  Tiles t(4, 6, static_cast<int>(4 * step));
  alignas(64) int32_t sums[2][2][kChannels][kChannels];
  P places(c, first, 1);
  for (int64_t pixel = first; pixel < last; pixel += most) {
    const int64_t count = std::min<int64_t>(most, last - pixel);
    for (int64_t r = 0; r < count; ++r) places.next(at.data() + r * taps, 1);
    const bool as_they_lie = places.plain() && count % kTileRows == 0;
    int64_t gathered_group = -1;
    for (int64_t p = from; p < to;) {
      const int64_t group = p / each, offset = group * c.apart;
      const int across = p + 1 < to && (p + 1) / each == group ? 2 : 1;
      if (!as_they_lie && group != gathered_group)
        for (int64_t r = 0; r < count; ++r) gathered(at.data() + r * taps, taps, offset, bytes, rows + r * stride);
      gathered_group = group;
      const int8_t* x = as_they_lie ? at[0] + offset : rows;
      const int64_t apart = as_they_lie ? c.channels : stride;
      const uint8_t *w0 = c.panels[p], *w1 = c.panels[p + across - 1];
      const int32_t* begin = begins.data() + (p - from) * kChannels;
      const bool one = count <= kTileRows;
      if (one && across == 1) sums_of_tiles<1, 1>(t, x, apart, w0, w1, fours, step, begin, sums);
      if (one && across == 2) sums_of_tiles<1, 2>(t, x, apart, w0, w1, fours, step, begin, sums);
      if (!one && across == 1) sums_of_tiles<2, 1>(t, x, apart, w0, w1, fours, step, begin, sums);
      if (!one && across == 2) sums_of_tiles<2, 2>(t, x, apart, w0, w1, fours, step, begin, sums);
      for (int i = 0; i < across; ++i, ++p) {
        const int64_t within = (p % each) * kChannels;
        const End end(c, group * c.rows + within, static_cast<int>(std::min<int64_t>(kChannels, c.rows - within)));
        for (int64_t r = 0; r < count; r += kTileRows)
          if (count - r >= kTileRows)
            end.template all<kTileRows>(pixel + r, sums[r / kTileRows][i]);
          else
            for (int64_t s = r; s < count; ++s) end(pixel + s, sums[r / kTileRows][i][s - r]);
      }
    }
  }
}

}  // namespace bitfold

#endif
