// x as a kernel reads it: rows in float32 or int8, padded with zeros, in the kernel's order; or such rows turned.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernel.h"

namespace bitfold {

// x [m, k]: rows of `padded` numbers; sums over `sum_cols` of them, 0 for none, less for the whole row.
struct Rows {
  const void* x;
  int64_t m, k, padded, sum_cols;
  const int8_t* order;
  int64_t lanes;  // numbers of a group, eight of which lie side by side, or 0

  bool moved() const { return order != nullptr || lanes != 0; }
  int64_t sums() const { return sum_cols == 0 ? 0 : sum_cols < 0 ? 1 : k / sum_cols; }  // of a row
};

// Numbers of eight groups side by side, four of each in turn, as their codes lie.
template <class T> void side_by_side(T* r, int64_t count, int64_t group) {
  T as_given[kGroups * kLongest];
  for (int64_t at = 0; at < count; at += kGroups * group) {
    std::memcpy(as_given, r + at, kGroups * group * sizeof(T));
    T* to = r + at;
    for (int64_t i = 0; i < group; i += 4)
      for (int lane = 0; lane < kGroups; ++lane, to += 4) std::memcpy(to, as_given + lane * group + i, 4 * sizeof(T));
  }
}

// Numbers of rows, 32 at a time, in the order in which codes leave a register.
inline void placed(float* r, int64_t count, const Rows& rows) {
  if (rows.lanes != 0) side_by_side(r, count, rows.lanes);
  for (int64_t at = 0; at < count && rows.order != nullptr; at += 32) {
    float as_given[32];
    std::memcpy(as_given, r + at, sizeof as_given);
    for (int i = 0; i < 32; ++i) r[at + i] = as_given[rows.order[i]];
  }
}

// Row `row` as it is given, and its sums [m, ..].
template <class From, class To> void ready(const Rows& rows, int64_t row, To* r, float* sums) {
  const int64_t cols = rows.sum_cols < 0 ? rows.k : rows.sum_cols, groups = rows.sums();
  for (int64_t i = 0; i < rows.k; ++i) r[i] = static_cast<To>(From::get(rows.x, row * rows.k + i));
  std::fill(r + rows.k, r + rows.padded, To(0));
  for (int64_t g = 0; g < groups; ++g) {
    if constexpr (std::is_same_v<To, float>) {
      float lanes[16] = {};  // as a vector adds, so that long groups lose no more than its sums do
      for (int64_t i = 0; i < cols; ++i) lanes[i % 16] += r[g * cols + i];
      float all = 0;
      for (float lane : lanes) all += lane;
      sums[row * groups + g] = all;
    } else {
      int64_t all = 0;
      for (int64_t i = 0; i < cols; ++i) all += r[g * cols + i];
      sums[row * groups + g] = static_cast<float>(all);
    }
  }
}

// Rows one behind the other, `padded` numbers each, as a panel: `depth` numbers of each row in turn.
template <int depth, class To, class Out>
void woven(const To* rows, int64_t padded, int width, Out* to) {
  for (int64_t k = 0; k < padded; k += depth)
    for (int i = 0; i < width; ++i, to += depth)
      for (int d = 0; d < depth; ++d) to[d] = rows[i * padded + k + d];
}

// Panels first .. last - 1: `width` rows side by side, `depth` numbers of each together; zeros where rows end.
template <class From, class To, class Out>
void turned(const Rows& rows, const Wants& wants, int64_t first, int64_t last, Out* panels, float* sums) {
  std::vector<To> own(wants.width * rows.padded);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t count = std::min<int64_t>(wants.width, rows.m - panel * wants.width);
    std::fill(own.begin() + count * rows.padded, own.end(), To(0));
    for (int64_t i = 0; i < count; ++i)
      ready<From>(rows, panel * wants.width + i, own.data() + i * rows.padded, sums);
    if constexpr (std::is_same_v<To, float>)
      placed(own.data(), count * rows.padded, rows);
    Out* to = panels + panel * wants.width * rows.padded;
    // A depth that the compiler does not know is a call of memcpy for each number.
    if (wants.depth == 1) woven<1>(own.data(), rows.padded, wants.width, to);
    if (wants.depth == 2) woven<2>(own.data(), rows.padded, wants.width, to);
    if (wants.depth == 4) woven<4>(own.data(), rows.padded, wants.width, to);
  }
}

// The sums of rows side by side: [.., across] from [m, ..].
inline void turned_sums(const Rows& rows, int64_t across, const float* sums, std::vector<float>& to) {
  const int64_t groups = rows.sums();
  to.assign(groups * across, 0.0f);
  for (int64_t m = 0; m < rows.m; ++m)
    for (int64_t g = 0; g < groups; ++g) to[g * across + m] = sums[m * groups + g];
}

}  // namespace bitfold
