// Depthwise kernels over codes that are not negative: four taps of a channel are one product in 32 bits.
//
// A line of the image is brought, for sixteen channels, into quads: of each column the bytes of four of its rows side by
// side, channel after channel (64 bytes). A quad is made once and multiplied kernel_width times, by the columns of the
// kernel in turn. One row that is left over lies in quads of four neighbours: of a kernel of 5 x 5 the products are
// 5 + 2 instead of 25.
//
//   quads.weights(panels, 3) ; quads.line(..) ; for pixels of the result: quads.sums<4>(0, i, to)
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "conv_lanes.h"

#if defined(__AVX2__)
#define BITFOLD_COLUMNS

namespace bitfold {

constexpr int kQuad = 4 * kChannels;

// Bytes of four taps side by side, sixteen channels each, in the channels' order. Stored as they will be read: a load of
// what two stores hold waits until both have left for the cache.
inline void quad(const int8_t* const* at, int8_t* to) {
  const auto load = [](const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
  const __m128i a = load(at[0]), b = load(at[1]), c = load(at[2]), d = load(at[3]);
  const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
  const __m128i more_ab = _mm_unpackhi_epi8(a, b), more_cd = _mm_unpackhi_epi8(c, d);
  const auto store = [](int8_t* p, __m128i low, __m128i high) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(high, low));
  };
  store(to, _mm_unpacklo_epi16(ab, cd), _mm_unpackhi_epi16(ab, cd));
  store(to + kQuad / 2, _mm_unpacklo_epi16(more_ab, more_cd), _mm_unpackhi_epi16(more_ab, more_cd));
}

// Products of `groups` quads with the weight's, added: what sixteen channels of one pixel sum to.
template <int kQuads>
inline void of_quads(const int8_t* x, const int64_t* offsets, int count, const int8_t* weight, int32_t* sums) {
  const int groups = kQuads ? kQuads : count;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  __m512i all = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int g = 0; g < groups; ++g)
    all = _mm512_dpbusd_epi32(all, _mm512_loadu_si512(x + offsets[g]), _mm512_loadu_si512(weight + g * kQuad));
  _mm512_storeu_si512(sums, all);
#else
  __m256i low = _mm256_setzero_si256(), high = low;
  const auto add = [](__m256i sum, const int8_t* a, const int8_t* w) {
    const __m256i of_x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i of_w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i pairs = _mm256_maddubs_epi16(of_x, of_w);  // at most 2 * 127 * 128: fits
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  };
#pragma GCC unroll 8
  for (int g = 0; g < groups; ++g) {
    low = add(low, x + offsets[g], weight + g * kQuad);
    high = add(high, x + offsets[g] + kQuad / 2, weight + g * kQuad + kQuad / 2);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums) + 1, high);
#endif
}

// The quads of one line of the result and sixteen channels. C: `Conv`.
template <class C> class Quads {
 public:
  explicit Quads(const C& c)
      : c_(c), rows_(c.kernel_height), fours_(rows_ / 4), left_(rows_ % 4), flat_(left_ == 1),
        planes_(fours_ + (left_ > 0)) {
    width_ = (c.out_width - 1) * c.stride_x + (c.kernel_width - 1) * c.dilation_x + 1;
    bytes_.resize((planes_ * width_ + (flat_ ? 3 * c.dilation_x : 0)) * kQuad);
    for (int64_t f = 0; f < fours_ + (left_ > 1); ++f)
      for (int64_t j = 0; j < c.kernel_width; ++j) offsets_.push_back((f * width_ + j * c.dilation_x) * kQuad);
    for (int64_t j = 0; flat_ && j < c.kernel_width; j += 4)
      offsets_.push_back((fours_ * width_ + j * c.dilation_x) * kQuad);
    nothing_.assign(kChannels, 0);
  }
  // Weights of sixteen channels each, [tap][16], in the same order.
  void weights(const uint8_t* const* panels, int64_t count) {
    weight_.resize(count * offsets_.size() * kQuad);
    for (int64_t p = 0; p < count; ++p) weight(panels[p], weight_.data() + p * offsets_.size() * kQuad);
  }
  // The line that starts with a pixel of the result, of the channels from `first` on.
  void line(int64_t pixel, int64_t first) {
    const int64_t y = pixel / c_.out_width % c_.out_height, image = pixel / c_.out_width / c_.out_height;
    for (int64_t f = 0; f < fours_ + (left_ > 1); ++f) {
      const int8_t* at[4];
      int64_t step[4];
      for (int64_t i = 0; i < 4; ++i) row(image, y, 4 * f + i, first, at[i], step[i]);
      columns(at, step, bytes_.data() + f * width_ * kQuad);
    }
    if (!flat_) return;
    const int8_t* from;
    int64_t step;
    row(image, y, rows_ - 1, first, from, step);
    int8_t* const to = bytes_.data() + fours_ * width_ * kQuad;
    const int64_t apart = c_.dilation_x, begin = std::clamp<int64_t>(c_.left, 0, width_);
    const int64_t end = std::clamp(c_.left + c_.width - 3 * apart, begin, width_);
    const int8_t* at[4];
    const auto outside = [&](int64_t x, int64_t last) {  // some of the four are
      for (; x < last; ++x) {
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t place = x + i * apart - c_.left;
          at[i] = place >= 0 && place < c_.width ? from + place * step : nothing_.data();
        }
        quad(at, to + x * kQuad);
      }
    };
    outside(0, begin);
    for (int64_t i = 0; i < 4; ++i) at[i] = from + (begin - c_.left + i * apart) * step;
    for (int64_t x = begin; x < end; ++x) {
      quad(at, to + x * kQuad);
      for (int64_t i = 0; i < 4; ++i) at[i] += step;
    }
    outside(end, width_);
  }
  // Of `pixels` of that line, from the i-th on, by the p-th weights.
  template <int pixels> void sums(int64_t p, int64_t i, int32_t (*to)[kChannels]) const {
    const int8_t* const weight = weight_.data() + p * offsets_.size() * kQuad;
    if (offsets_.size() == 3) return each<3, pixels>(weight, i, to);
    if (offsets_.size() == 7) return each<7, pixels>(weight, i, to);
    each<0, pixels>(weight, i, to);
  }

 private:
  template <int kQuads, int pixels> void each(const int8_t* weight, int64_t i, int32_t (*to)[kChannels]) const {
    const int64_t apart = c_.stride_x * kQuad;
    const int8_t* x = bytes_.data() + i * apart;
    for (int p = 0; p < pixels; ++p, x += apart)
      of_quads<kQuads>(x, offsets_.data(), static_cast<int>(offsets_.size()), weight, to[p]);
  }
  void weight(const uint8_t* panel, int8_t* to) const {
    const auto put = [&](int64_t row, int64_t down, int64_t column, int64_t across) {
      const int8_t* at[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t y = row + i * down, x = column + i * across;
        const bool there = y < rows_ && x < c_.kernel_width;
        at[i] = there ? reinterpret_cast<const int8_t*>(panel) + (y * c_.kernel_width + x) * kChannels : nothing_.data();
      }
      quad(at, to);
      to += kQuad;
    };
    for (int64_t row = 0; row < rows_ - flat_; row += 4)
      for (int64_t j = 0; j < c_.kernel_width; ++j) put(row, 1, j, 0);
    for (int64_t j = 0; flat_ && j < c_.kernel_width; j += 4) put(rows_ - 1, 0, j, 1);
  }
  // Where a row that the kernel reads begins, and how far its next pixel is; zeros, again and again, outside.
  void row(int64_t image, int64_t line, int64_t i, int64_t first, const int8_t*& at, int64_t& step) const {
    const int64_t y = line * c_.stride_y - c_.top + i * c_.dilation_y;
    const bool inside = i < rows_ && y >= 0 && y < c_.height;
    at = inside ? c_.x + (image * c_.height + y) * c_.width * c_.channels + first : nothing_.data();
    step = inside ? c_.channels : 0;
  }
  void columns(const int8_t* const* from, const int64_t* step, int8_t* to) const {
    const int64_t begin = std::clamp<int64_t>(c_.left, 0, width_), end = std::clamp(c_.left + c_.width, begin, width_);
    std::memset(to, 0, begin * kQuad);
    const int8_t* at[4] = {from[0], from[1], from[2], from[3]};
    for (int64_t x = begin; x < end; ++x) {
      quad(at, to + x * kQuad);
      for (int i = 0; i < 4; ++i) at[i] += step[i];
    }
    std::memset(to + end * kQuad, 0, (width_ - end) * kQuad);
  }

  const C& c_;
  const int64_t rows_, fours_, left_;
  const bool flat_;
  const int64_t planes_;
  int64_t width_;
  std::vector<int8_t> bytes_, weight_, nothing_;
  std::vector<int64_t> offsets_;
};

}  // namespace bitfold

#endif
