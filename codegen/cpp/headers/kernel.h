// What a generated kernel and the runtime agree on.
#pragma once
#include <cstdint>

namespace bitfold {

// Weights that one x multiplies, and tensors that an epilogue reads, at most.
constexpr int kWeights = 4;
constexpr int kExtras = 8;

struct Weight {
  const uint8_t* codes;  // rows of `stride` bytes
  const void* scales;    // at row * scale_row + group * scale_group
  const void* zeros;     // beside the scales
  const float* level;    // one number for all scales
  const void* bias;      // [n]
};

// One call: y [m, n] from x [m, k]. `x` is made ready once: rows of `padded` numbers, zeros behind the k-th.
struct Call {
  int64_t m, n, k, padded;
  int64_t stride, scale_row, scale_group, groups;  // groups: of a row, that have a scale of their own
  const void* x;
  const float* x_sums;    // [m, ..]: sums over as many numbers as `sum_cols` says, for what is added to values
  const float* x_scales;  // [m] or [m, blocks]: of activations that are quantized
  Weight weights[kWeights];
  const void* extras[kExtras];
  void* y;
};

}  // namespace bitfold
