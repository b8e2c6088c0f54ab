// What generated kernels of convolutions and the operator that calls them agree on, and the loops around a tile.
//
// An image is [images, height, width, channels] of int8, a result [pixels, n]. A weight is panels of sixteen rows;
// one that is narrower is widened with zeros before the call. Each pixel of the result reads its taps through
// pointers; those outside of the image point at zeros.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv_lanes.h"

namespace bitfold {

constexpr int kReads = 8, kWrites = 8;

struct Conv {
  const int8_t* x;
  const int8_t* zeros;  // as many as a pixel has channels, and 64 more
  int64_t images, height, width, channels;
  int64_t out_height, out_width, n;
  int64_t kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x;
  int64_t groups, rows, depth;           // groups of channels; of one: rows of the weight, and channels of x
  const uint8_t* const* panels;          // one address each, group by group
  const float *factors, *bias;           // [n + 16]: what a sum is worth; what is added
  const float* vectors[kReads];          // [n + 16]
  const void* reads[kReads];             // [pixels, n], float32 or int8
  float units[kReads];                   // what a code that is read is worth
  void* writes[kWrites];                 // [pixels, n], float32 or int8
  float inverses[kWrites];               // codes of a unit that is written

  int64_t pixels() const { return images * out_height * out_width; }
  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t panels_of_group() const { return (rows + kLanes - 1) / kLanes; }
};

// For each tap of pixels first .. first + rows - 1 of the result, [tap][rows].
inline void pointers(const Conv& c, int64_t first, int rows, const int8_t** at) {
  for (int r = 0; r < rows; ++r) {
    const int64_t x = (first + r) % c.out_width, line = (first + r) / c.out_width;
    const int64_t y = line % c.out_height, image = line / c.out_height;
    const int8_t* base = c.x + image * c.height * c.width * c.channels;
    const int8_t** to = at + r;
    for (int64_t i = 0; i < c.kernel_height; ++i) {
      const int64_t row = y * c.stride_y - c.top + i * c.dilation_y;
      const bool inside = row >= 0 && row < c.height;
      for (int64_t j = 0; j < c.kernel_width; ++j, to += rows) {
        const int64_t column = x * c.stride_x - c.left + j * c.dilation_x;
        *to = inside && column >= 0 && column < c.width ? base + (row * c.width + column) * c.channels : c.zeros;
      }
    }
  }
}

template <bool positive, int rows, int halves, class End>
inline void tile(const Conv& c, const int8_t* const* at, const uint8_t* panel, int64_t offset, int64_t pixel,
                 int64_t row, int live, const End& end) {
  Tile<positive, rows, halves> t;
  t.clear();
  for (int64_t tap = 0; tap < c.taps(); ++tap, at += rows)
    for (int64_t i = 0; i < c.depth; i += 4, panel += 4 * kLanes) t.add(panel, at, offset + i);
  alignas(64) int32_t sums[kLanes] = {};
  for (int r = 0; r < rows; ++r) {
    t.store(r, sums);
    end(c, pixel + r, row, live, sums);
  }
}

template <bool positive, int rows, class End>
inline void panel(const Conv& c, const int8_t* const* at, int64_t first, int64_t last, int64_t pixel, const End& end) {
  const int64_t each = c.panels_of_group();
  for (int64_t p = first; p < last; ++p) {
    const int64_t group = p / each, within = (p % each) * kLanes;
    const int live = static_cast<int>(std::min<int64_t>(kLanes, c.rows - within));
    const int64_t row = group * c.rows + within, offset = group * c.depth;
    if (live > 8)
      tile<positive, rows, 2>(c, at, c.panels[p], offset, pixel, row, live, end);
    else
      tile<positive, rows, 1>(c, at, c.panels[p], offset, pixel, row, live, end);
  }
}

template <bool positive, int rows, class End>
inline void some(const Conv& c, int count, const int8_t* const* at, int64_t first, int64_t last, int64_t pixel,
                 const End& end) {
  if (count == rows) return panel<positive, rows>(c, at, first, last, pixel, end);
  if constexpr (rows > 1) some<positive, rows - 1>(c, count, at, first, last, pixel, end);
}

// Pixels [first, last) of the result times panels [from, to), tiles of nearly equal numbers of pixels.
template <bool positive, class End>
inline void gemm(const Conv& c, int64_t first, int64_t last, int64_t from, int64_t to, const End& end) {
  thread_local std::vector<const int8_t*> at;
  at.resize(c.taps() * kRows);
  const int64_t count = last - first, tiles = (count + kRows - 1) / kRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t a = first + count * t / tiles, b = first + count * (t + 1) / tiles;
    pointers(c, a, static_cast<int>(b - a), at.data());
    some<positive, kRows>(c, static_cast<int>(b - a), at.data(), from, to, a, end);
  }
}

// The same where each group is one channel of x: panels are sixteen channels, of which each tap is one line.
template <class End>
inline void depthwise(const Conv& c, int64_t first, int64_t last, int64_t from, int64_t to, const End& end) {
  thread_local std::vector<const int8_t*> at;
  thread_local std::vector<int16_t> weight;
  const int taps = static_cast<int>(c.taps());
  const int64_t line = c.out_width, size = kLanes * ((taps + 1) / 2 * 2);
  at.resize(taps * line);
  weight.resize(size * (to - from));
  for (int64_t p = from; p < to; ++p) woven(c.panels[p], taps, kLanes, weight.data() + (p - from) * size);
  alignas(64) int32_t sums[kLanes];
  for (int64_t a = first; a < last; a += line) {
    const int64_t count = std::min(line, last - a);
    for (int64_t i = 0; i < count; ++i) pointers(c, a + i, 1, at.data() + i * taps);
    for (int64_t p = from; p < to; ++p) {
      const int live = static_cast<int>(std::min<int64_t>(kLanes, c.n - p * kLanes));
      const int16_t* w = weight.data() + (p - from) * size;
      for (int64_t i = 0; i < count; ++i) {
        if (taps == 9)
          each_channel<9>(at.data() + i * taps, p * kLanes, taps, w, sums);
        else
          each_channel<0>(at.data() + i * taps, p * kLanes, taps, w, sums);
        end(c, a + i, p * kLanes, live, sums);
      }
    }
  }
}

}  // namespace bitfold
