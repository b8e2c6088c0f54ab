// What a generated kernel and the runtime agree on.
#pragma once
#include <cstdint>

namespace bitfold {

// Weights that one x multiplies, in a kernel or in calls beside one another, and tensors that an epilogue reads, at most
// (MOST_WEIGHTS and MOST_EXTRAS of codegen/spec.py).
constexpr int kWeights = 4;
constexpr int kExtras = 8;
// Groups of a row of the weight that lie side by side, four codes of each in turn (formats/group_lanes.py), and numbers
// of a group then, at most (LONGEST of codegen/cpp/support.py).
constexpr int kGroups = 8;
constexpr int kLongest = 128;

struct Weight {
  const uint8_t* codes;  // rows of `stride` bytes
  const void* scales;    // at row * scale_row + group * scale_group
  const void* zeros;     // beside the scales
  const float* level;    // one number for all scales
  const void* bias;      // [n]
};

// How a kernel wants x: it may be written in other vectors than the runtime.
struct Wants {
  const int8_t* order;           // number i of 32 is number order[i] of x's; null: as they lie
  int32_t width, depth, size;    // a panel: rows side by side, numbers of each together, bytes of a number
  int32_t least;                 // rows of x from which on panels are made, and rows of the weight decoded once for all
  int32_t rows;                  // of the weight, that a task of many rows of x takes
  int32_t digits, base, words;   // numbers of one row of x to a block of digits (digits.h), 0 for none; see there
  int32_t tiles;                 // whether panels are multiplied in tiles of AMX (tiled.h)
  int32_t many, step;            // then numbers of many rows of x to a block of digits, 0 for none, and to a tile
  int32_t lanes, joined;         // numbers of a group where eight lie side by side, else 0; of one row in digits, numbers
                                 // of a group whose sums are joined at once
};

// One call: y [m, n] from x [m, k]. `x` is made ready once: rows of `padded` numbers, zeros behind the k-th, in
// the order that codes are decoded in.
struct Call {
  int64_t m, n, k, padded;
  int64_t stride, scale_row, scale_group, groups;  // groups: of a row, that have a scale of their own
  int64_t scale_count;                             // of a weight
  const void* x;
  const float* x_sums;    // [m, ..]: sums over as many numbers as `sum_cols` says, for what is added to values
  const float* x_scales;  // [m] or [m, blocks]: of activations that are quantized
  Weight weights[kWeights];
  const void* extras[kExtras];
  void* y;
  // Many rows of x, turned (panels.h), and their sums, [.., across]: `across` is m, rounded up to whole panels.
  const void* panels;
  const float* sum_panels;
  int64_t across;
  // One row of x in digits (digits.h), or many (tiled.h); null where x is read as numbers.
  const int8_t* digits;
  const int32_t* middles;
  const float* steps;
  float x_unit;
  const uint8_t* refused;  // of many rows in digits, a byte for each panel: not 0 where it is to be read as numbers
};

}  // namespace bitfold
