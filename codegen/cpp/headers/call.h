// x of a call made ready, as its kernel wants it: digits of one row, rows as they lie or in float32, panels of many.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "digits.h"
#include "keeps.h"
#include "kernel.h"
#include "numbers.h"
#include "ready.h"
#include "tiled.h"

namespace bitfold {

using Run = void (*)(const Call*, int64_t, int64_t);
using Many = void (*)(const Call*, int64_t, int64_t, int64_t, int64_t);

// What a spec says, in numbers; `codegen/cpp/build.py` fills one in.
struct Facts {
  Run run;    // a few rows of x
  Many many;  // many, from panels; null where x has a scale for each block
  const Wants* (*wants)();
  int64_t n, k, padded, stride, scale_row, scale_group, groups, sum_cols;
  int32_t weights, parts, scales, zeros, level;  // the last three: places among a weight's parts, or -1
  int32_t bias, matrices, vectors, codes, out;   // codes: x comes in int8; out: 0 float32, 1 bfloat16, 2 float16
  int32_t token_scales;                          // of x: 0 none, 1 for all, else one more than a row has
  int32_t x;                                     // 0 float32, 1 bfloat16, 2 float16: of biases and extras too
  int64_t scale_count, scale_type, zero_type;    // numbers of a weight's scales; a type as `out` says it, -1 for a byte
};

struct Scratch {
  std::vector<float> numbers, sums, turned, scales, as_given;
  std::vector<int8_t> codes;
  std::vector<uint8_t> refused;
  std::vector<int16_t> panels;
  Digits digits;
  // A long prompt's copy is not kept for the tokens after it.
  void trim(size_t wanted) {
    gives_back(numbers, wanted), gives_back(sums, wanted), gives_back(turned, wanted), gives_back(codes, wanted);
    gives_back(as_given, wanted), gives_back(panels, wanted);
    gives_back(digits.digits, wanted), gives_back(digits.steps, wanted);
  }
};

template <class From, class To, class Out>
void all_turned(const Rows& rows, const Wants& wants, Out* panels, float* sums) {
  torch::stable::parallel_for(0, (rows.m + wants.width - 1) / wants.width, 1, [&](int64_t first, int64_t last) {
    turned<From, To>(rows, wants, first, last, panels, sums);
  });
}

// Rows of x as they are given, with sums; for floats as they lie, nothing is to be done.
template <class From, class To> void all_ready(const Rows& rows, To* to, float* sums) {
  torch::stable::parallel_for(0, rows.m, 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) ready<From>(rows, m, to + m * rows.padded, sums);
  });
}

// x in bytes, for tiles.
inline void many_bytes(Call& call, const Facts& f, const Rows& rows, Scratch& scratch) {
  const auto* x = static_cast<const int8_t*>(rows.x);
  int64_t k = f.k;
  if (rows.sums() > 0) {
    scratch.codes.resize(call.m * f.padded);
    all_ready<i8>(rows, scratch.codes.data(), scratch.sums.data());
    x = scratch.codes.data(), k = f.padded;
  }
  auto* const to = reinterpret_cast<int8_t*>(lined_up(scratch.panels, (call.across * f.padded + 1) / 2));
  torch::stable::parallel_for(0, tasks_of_tiled(call.m, f.padded), 1, [&](int64_t first, int64_t last) {
    bytes_tiled(x, call.m, k, f.padded, to, first, last);
  });
  call.panels = to;
}

// Panels of float32, those that `refused` names, if it is given.
inline void many_floats(Call& call, const Facts& f, const Rows& rows, const uint8_t* refused, Scratch& scratch) {
  const Wants& wants = *f.wants();
  float *const to = lined_up(scratch.numbers, call.across * f.padded), *const sums = scratch.sums.data();
  torch::stable::parallel_for(0, call.across / wants.width, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      if (refused != nullptr && refused[panel] == 0) continue;
      if (f.x == 0) turned<f32, float>(rows, wants, panel, panel + 1, to, sums);
      if (f.x == 1) turned<bf16, float>(rows, wants, panel, panel + 1, to, sums);
      if (f.x == 2) turned<f16, float>(rows, wants, panel, panel + 1, to, sums);
    }
  });
  call.panels = to;
}

// x in digits, for tiles; panels with rows that have none as float32, like those of other kernels.
inline void many_digits(Call& call, const Facts& f, const Rows& rows, Scratch& scratch) {
  const Wants& wants = *f.wants();
  const auto* x = static_cast<const float*>(rows.x);
  if (f.x != 0 || f.padded != f.k || rows.sums() > 0) {
    scratch.as_given.resize(call.m * f.padded);
    float *const numbers = scratch.as_given.data(), *const sums = scratch.sums.data();
    if (f.x == 0) all_ready<f32>(rows, numbers, sums);
    if (f.x == 1) all_ready<bf16>(rows, numbers, sums);
    if (f.x == 2) all_ready<f16>(rows, numbers, sums);
    x = numbers;
  }
  int8_t* const to = lined_up(scratch.digits.digits, 3 * call.across * f.padded);
  scratch.digits.steps.resize((f.padded + wants.many - 1) / wants.many * call.across);
  float* const units = scratch.digits.steps.data();
  scratch.refused.assign(call.across / wants.width, 0);
  uint8_t* const refused = scratch.refused.data();
  torch::stable::parallel_for(0, tasks_of_tiled(call.m, f.padded), 1, [&](int64_t first, int64_t last) {
    digits_tiled(x, call.m, f.padded, wants, call.across, to, units, refused, first, last);
  });
  call.digits = to, call.steps = units, call.refused = refused;
  if (std::any_of(scratch.refused.begin(), scratch.refused.end(), [](uint8_t one) { return one != 0; }))
    many_floats(call, f, rows, refused, scratch);
}

inline void many(Call& call, const Facts& f, const Rows& rows, Scratch& scratch) {
  const Wants& wants = *f.wants();
  call.digits = nullptr;  // one row may have some, though panels are to be read
  call.across = (call.m + wants.width - 1) / wants.width * wants.width;
  float* sums = scratch.sums.data();
  if (wants.tiles && f.codes) {
    many_bytes(call, f, rows, scratch);
  } else if (wants.many > 0) {
    many_digits(call, f, rows, scratch);
  } else if (!f.codes) {
    many_floats(call, f, rows, nullptr, scratch);
  } else {
    int16_t* const to = lined_up(scratch.panels, call.across * f.padded);
    if (wants.size == 1)
      all_turned<i8, int8_t>(rows, wants, reinterpret_cast<int8_t*>(to), sums);
    else
      all_turned<i8, int8_t>(rows, wants, to, sums);
    call.panels = to;
  }
  turned_sums(rows, call.across, sums, scratch.turned);
  call.sum_panels = scratch.turned.data();
}

// Whether a sum of raw codes, of up to 2**32 in a register, times such numbers may pass float32 where values do not.
inline bool large(const float* x, int64_t count) {
  constexpr int32_t least = (127 + 64) << 23;  // 2**64, as the integer that its bits are
  int32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    top = std::max(top, bits & 0x7fffffff);
  }
  return top >= least;
}

// Whether all rows are multiplied from panels; x is float32, bfloat16, float16 or bytes of codes, as the facts say.
inline bool made_ready(Call& call, const Facts& f, const void* x, Scratch& scratch) {
  scratch.trim(call.m * f.padded);
  const Rows rows = {x, call.m, f.k, f.padded, f.sum_cols, f.wants()->order, f.wants()->lanes};
  scratch.sums.resize(call.m * rows.sums());
  call.x_sums = scratch.sums.data();
  float* sums = scratch.sums.data();
  bool turn = call.m >= f.wants()->least && f.many != nullptr;
  const bool floats = !f.codes && f.x == 0;
  const bool as_it_lies = floats && f.padded == f.k && f.sum_cols == 0;
  const bool alone = call.m == 1 && f.wants()->digits > 0;
  if (turn) {
    // `many` below.
  } else if (f.codes) {
    int8_t* const codes = lined_up(scratch.codes, call.m * f.padded);
    for (int64_t m = 0; m < call.m; ++m) ready<i8>(rows, m, codes + m * f.padded, sums);
    if (rows.lanes != 0) side_by_side(codes, call.m * f.padded, rows.lanes);
    call.x = codes;
  } else if (as_it_lies && !rows.moved() && !alone) {
    call.x = rows.x;
    turn = f.many != nullptr && large(static_cast<const float*>(rows.x), call.m * f.k);
  } else if (alone && as_it_lies && in_digits(static_cast<const float*>(rows.x), f.padded, *f.wants(), scratch.digits,
                                              call)) {
    // Nothing else reads x.
  } else {
    float* const numbers = lined_up(scratch.numbers, call.m * f.padded);
    for (int64_t m = 0; m < call.m; ++m) {
      float* to = numbers + m * f.padded;
      if (f.x == 0) ready<f32>(rows, m, to, sums);
      if (f.x == 1) ready<bf16>(rows, m, to, sums);
      if (f.x == 2) ready<f16>(rows, m, to, sums);
    }
    call.x = numbers;
    // What is added to codes is multiplied by a sum of x. An infinity in it meets codes that are zero, or of the other
    // sign, where no value is: then values are multiplied, decoded whole.
    const auto finite = [](float sum) { return std::isfinite(sum); };
    turn = f.many != nullptr && (large(numbers, call.m * f.padded) ||
                                 !std::all_of(scratch.sums.begin(), scratch.sums.end(), finite));
    if (!(alone && !as_it_lies && in_digits(numbers, f.padded, *f.wants(), scratch.digits, call)))
      placed(numbers, call.m * f.padded, rows);
  }
  if (turn) many(call, f, rows, scratch);
  return turn;
}

// The same x as another call's, whose kernel wants it alike: what that one was given.
inline bool wants_alike(const Facts& f, const Facts& other) {
  return f.wants == other.wants && f.k == other.k && f.padded == other.padded && f.sum_cols == other.sum_cols;
}
inline void given_as(Call& call, const Call& other) {
  call.x = other.x, call.x_sums = other.x_sums;
  call.panels = other.panels, call.sum_panels = other.sum_panels, call.across = other.across;
  call.digits = other.digits, call.middles = other.middles, call.steps = other.steps, call.x_unit = other.x_unit;
  call.refused = other.refused;
}

}  // namespace bitfold
