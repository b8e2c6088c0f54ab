// What generated kernels of convolutions and the operator that calls them agree on, and the loops around a tile.
//
// An image is [images, height, width, channels] of int8, a result [pixels, n]. A weight is panels of sixteen rows;
// one that is narrower is widened with zeros before the call. Each pixel of the result reads its taps through
// pointers; those outside of the image point at zeros.
//
// An `End` takes the sums of a pixel of the result and stores it: it is made for sixteen channels, End(call, row, live),
// of which `live` are there, and called for one pixel after the other, end(pixel, sums), or for several, end.all<rows>.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "columns.h"
#include "conv_ends.h"
#include "conv_tiles.h"

namespace bitfold {

constexpr int kReads = 8, kWrites = 8;

struct Conv {
  const int8_t* x;      // in 16 bits each, the zero point taken off, if the kernel wants it so
  const int8_t* zeros;  // as many bytes as a pixel has, and 64 more, of what stands for 0 in x
  int32_t zero;         // x's code for 0
  int64_t images, height, width, channels;
  int64_t out_height, out_width, n;
  int64_t kernel_height, kernel_width, stride_y, stride_x, top, left, dilation_y, dilation_x;
  int64_t groups, rows, depth, apart;    // groups of channels; of one: rows of the weight, channels of x, and how far
                                         // the next one's are
  const uint8_t* const* panels;          // one address each, group by group
  const float *factors, *bias;           // [n + 16]: what a sum is worth; what is added
  const float* vectors[kReads];          // [n + 16]
  const void* reads[kReads];             // [pixels, n], float32 or int8
  float units[kReads];                   // what a code that is read is worth
  float origins[kReads];                 // and the code for 0
  void* writes[kWrites];                 // [pixels, n], float32 or int8
  float inverses[kWrites];               // codes of a unit that is written
  int32_t starts[kWrites];               // and the code for 0

  int64_t pixels() const { return images * out_height * out_width; }
  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t panels_of_group() const { return (rows + kChannels - 1) / kChannels; }
};

// Where the taps of one pixel of the result after the other are, without a division each. A channel has `bytes`.
class Places {
 public:
  Places(const Conv& c, int64_t first, int64_t bytes) : c_(c), bytes_(bytes) {
    column_ = first % c.out_width, line_ = first / c.out_width % c.out_height;
    image_ = first / c.out_width / c.out_height;
    plain_ = c.taps() == 1 && c.stride_x == 1 && c.stride_y == 1 && c.top == 0 && c.left == 0 &&
             c.out_width == c.width && c.out_height == c.height;
    step_ = c.channels * bytes;
    at_ = c.x + first * step_;
    if (plain_) return;
    rows_.resize(c.kernel_height);
    line();
  }
  // The next pixel's, `apart` pointers from tap to tap.
  void next(const int8_t** to, int64_t apart) {
    if (plain_) {
      *to = at_;
      at_ += step_;
      return;
    }
    const int64_t begin = column_ * c_.stride_x - c_.left;
    for (const int8_t* row : rows_)
      for (int64_t j = 0, x = begin; j < c_.kernel_width; ++j, x += c_.dilation_x, to += apart)
        *to = row != nullptr && static_cast<uint64_t>(x) < static_cast<uint64_t>(c_.width) ? row + x * step_ : c_.zeros;
    if (++column_ < c_.out_width) return;
    column_ = 0;
    if (++line_ == c_.out_height) line_ = 0, ++image_;
    if (image_ < c_.images) line();
  }
  // Whether pixels of the result are pixels of x.
  bool plain() const { return plain_; }

 private:
  void line() {
    for (int64_t i = 0; i < c_.kernel_height; ++i) {
      const int64_t y = line_ * c_.stride_y - c_.top + i * c_.dilation_y;
      rows_[i] = y >= 0 && y < c_.height ? c_.x + (image_ * c_.height + y) * c_.width * step_ : nullptr;
    }
  }

  const Conv& c_;
  int64_t bytes_, column_, line_, image_, step_;
  bool plain_;
  const int8_t* at_;
  std::vector<const int8_t*> rows_;
};

// Four channels of each chain of sums; returns where the panel goes on.
template <int chain = 0, class T>
inline const uint8_t* in_turn(T& t, const uint8_t* panel, const int8_t* const* at, int64_t offset) {
  if constexpr (chain == T::kChains) {
    return panel;
  } else {
    t.template add<chain>(panel, at, offset + 4 * chain);
    return in_turn<chain + 1>(t, panel + 4 * kChannels, at, offset);
  }
}

template <bool positive, int rows, int halves, class End>
inline void tile(const Conv& c, const int8_t* const* at, const uint8_t* panel, int64_t offset, int64_t pixel,
                 const End& end) {
  Tile<positive, rows, halves> t;
  constexpr int step = 4 * t.kChains, bytes = kBytes<positive>;
  t.clear(c.zero);
  for (int64_t tap = 0; tap < c.taps(); ++tap, at += rows) {
    int64_t i = 0;
    if constexpr (t.kChains > 1)
      for (; i + step <= c.depth; i += step) panel = in_turn(t, panel, at, (offset + i) * bytes);
    for (; i < c.depth; i += 4, panel += 4 * kChannels) t.template add<0>(panel, at, (offset + i) * bytes);
  }
  t.join();
  alignas(64) int32_t sums[rows][kChannels];
  // Unrolled, or the sums of the loop above would be kept in memory for the sake of their index here.
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) t.store(r, sums[r]);
  if constexpr (halves == 1)
    for (int r = 0; r < rows; ++r) std::memset(sums[r] + kChannels / 2, 0, sizeof(int32_t) * kChannels / 2);
  end.template all<rows>(pixel, sums);
}

// `count` tiles of so many pixels, one after the other, by one panel.
template <bool positive, int rows, class End>
inline void tiles(const Conv& c, int count_of_rows, const int8_t* const* at, const uint8_t* panel, int64_t offset,
                  int64_t pixel, int64_t count, const End& end) {
  if (count_of_rows == rows) {
    for (int64_t t = 0; t < count; ++t, at += c.taps() * rows, pixel += rows)
      if (end.live > kChannels / 2)
        tile<positive, rows, 2>(c, at, panel, offset, pixel, end);
      else
        tile<positive, rows, 1>(c, at, panel, offset, pixel, end);
    return;
  }
  if constexpr (rows > 1) tiles<positive, rows - 1>(c, count_of_rows, at, panel, offset, pixel, count, end);
}

// x as the kernel reads it, if not as it is.
inline void widen(const Conv& c, int16_t* to) {
  widened(c.x, c.images * c.height * c.width * c.groups, c.depth, c.zero, to);
}

// Pixels [first, last) of the result times panels [from, to), tiles of nearly equal numbers of pixels. A panel stays in
// the innermost cache while all tiles meet it.
template <bool positive, class End>
inline void gemm(const Conv& c, int64_t first, int64_t last, int64_t from, int64_t to) {
#if defined(BITFOLD_TILES)
  if (const int64_t step = fours_of_step(c.taps() * ((c.depth + 3) / 4)); step > 0 && last - first >= kTileRows)
    return gemm_in_tiles<Conv, Places, End>(c, first, last, from, to, step);
#endif
  thread_local std::vector<const int8_t*> at;
  const int64_t taps = c.taps(), count = last - first, all = (count + kPixels - 1) / kPixels;
  const int64_t less = count / all, longer = count % all;  // so many tiles have one pixel more
  at.resize(taps * count);
  Places places(c, first, kBytes<positive>);
  const int8_t** tile_at = at.data();
  for (int64_t t = 0; t < all; ++t) {
    const int64_t rows = less + (t < longer);
    for (int64_t r = 0; r < rows; ++r) places.next(tile_at + r, rows);
    tile_at += taps * rows;
  }
  const int64_t each = c.panels_of_group(), split = longer * (less + 1);
  for (int64_t p = from; p < to; ++p) {
    const int64_t group = p / each, within = (p % each) * kChannels, offset = group * c.apart;
    const End end(c, group * c.rows + within, static_cast<int>(std::min<int64_t>(kChannels, c.rows - within)));
    tiles<positive, kPixels>(c, static_cast<int>(less + 1), at.data(), c.panels[p], offset, first, longer, end);
    tiles<positive, kPixels>(c, static_cast<int>(less), at.data() + taps * split, c.panels[p], offset, first + split,
                           all - longer, end);
  }
}

#if defined(BITFOLD_COLUMNS)
// Depthwise, where no number of x is negative.
template <class End>
inline void by_columns(const Conv& c, int64_t first, int64_t last, int64_t from, int64_t to) {
  Quads<Conv> quads(c);
  constexpr int together = 4;  // what an end reads of the call is read once for so many pixels
  alignas(64) int32_t sums[together][kChannels];
  quads.weights(c.panels + from, to - from);
  for (int64_t a = first; a < last; a += c.out_width) {
    const int64_t count = std::min(c.out_width, last - a);
    for (int64_t p = from; p < to; ++p) {
      const End end(c, p * kChannels, static_cast<int>(std::min<int64_t>(kChannels, c.n - p * kChannels)));
      quads.line(a, p * kChannels);
      int64_t i = 0;
      for (; i + together <= count; i += together) {
        quads.template sums<together>(p - from, i, sums);
        end.template all<together>(a + i, sums);
      }
      for (; i < count; ++i) {
        quads.template sums<1>(p - from, i, sums);
        end(a + i, sums[0]);
      }
    }
  }
}
#endif

// The same where each group is one channel of x: panels are sixteen channels, of which each tap is one line.
template <bool positive, bool zero, class End>
inline void depthwise(const Conv& c, int64_t first, int64_t last, int64_t from, int64_t to) {
#if defined(BITFOLD_COLUMNS)
  if constexpr (positive) return by_columns<End>(c, first, last, from, to);
#endif
  thread_local std::vector<const int8_t*> at;
  thread_local std::vector<int16_t> weight;
  const int taps = static_cast<int>(c.taps());
  const int64_t line = c.out_width, size = kChannels * ((taps + 1) / 2 * 2);
  at.resize(taps * line);
  weight.resize(size * (to - from));
  for (int64_t p = from; p < to; ++p) woven(c.panels[p], taps, kChannels, weight.data() + (p - from) * size);
  alignas(64) int32_t sums[kChannels];
  Places places(c, first, 1);
  for (int64_t a = first; a < last; a += line) {
    const int64_t count = std::min(line, last - a);
    for (int64_t i = 0; i < count; ++i) places.next(at.data() + i * taps, 1);
    for (int64_t p = from; p < to; ++p) {
      const int live = static_cast<int>(std::min<int64_t>(kChannels, c.n - p * kChannels));
      const int16_t* w = weight.data() + (p - from) * size;
      const End end(c, p * kChannels, live);
      for (int64_t i = 0; i < count; ++i) {
        if (taps == 9)
          each_channel<9, zero>(at.data() + i * taps, p * kChannels, taps, w, c.zero, sums);
        else
          each_channel<0, zero>(at.data() + i * taps, p * kChannels, taps, w, c.zero, sums);
        end(a + i, sums);
      }
    }
  }
}

}  // namespace bitfold
