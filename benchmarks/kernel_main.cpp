// A kernel by itself, without torch: reads one call from a file, writes y; what sanitizers and emulators run.
// In: numbers as below (turn: whether x is panels, -1 for where the kernel wants it so), then x, x's scales, codes, scales,
// zeros, level, bias, each behind its size in bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel.h"
#include VECTORS
#include "digits.h"
#include "numbers.h"
#include "ready.h"
#include "tiled.h"

using namespace bitfold;
extern "C" void run(const Call*, int64_t, int64_t);
extern "C" __attribute__((weak)) void many(const Call*, int64_t, int64_t, int64_t,
                                                   int64_t);
extern "C" const Wants* wants();

struct Given {
  int64_t m, n, k, padded, stride, scale_row, scale_group, groups, sum_cols, codes, turn, out, repeats, scale_count;
};

int main(int, char** names) {
  FILE* file = std::fopen(names[1], "rb");
  Given g;
  if (file == nullptr || std::fread(&g, sizeof g, 1, file) != 1) return 2;
  void* parts[7];
  for (void*& part : parts) {  // each in memory of just its size, where a sanitizer sees a step too far
    int64_t size;
    if (std::fread(&size, 8, 1, file) != 1) return 2;
    part = size > 0 ? std::malloc(size) : nullptr;
    if (size > 0 && std::fread(part, size, 1, file) != 1) return 2;
  }
  std::fclose(file);
  const Rows rows = {parts[0], g.m, g.k, g.padded, g.sum_cols, wants()->order, wants()->lanes};
  std::vector<float> sums(g.m * rows.sums()), turned_, numbers, units;
  std::vector<int8_t> codes, cut;
  std::vector<int16_t> wide;
  Digits digits;
  std::vector<char> y(g.m * g.n * g.out);
  Call call{};
  call.m = g.m, call.n = g.n, call.k = g.k, call.padded = g.padded, call.stride = g.stride;
  call.scale_row = g.scale_row, call.scale_group = g.scale_group, call.groups = g.groups;
  call.scale_count = g.scale_count;
  call.x_scales = static_cast<const float*>(parts[1]);
  call.weights[0] = {static_cast<const uint8_t*>(parts[2]), parts[3], parts[4], static_cast<const float*>(parts[5]),
                     parts[6]};
  call.y = y.data();
  const bool turn = g.turn < 0 ? many != nullptr && g.m >= wants()->least : g.turn != 0;
  if (turn) {
    const int64_t width = wants()->width, panels = (g.m + width - 1) / width;
    call.across = panels * width;
    const int64_t blocks = wants()->many > 0 ? (g.padded + wants()->many - 1) / wants()->many : 0;
    bool in_tiles = false;
    if (blocks > 0) {
      numbers.resize(g.m * g.padded), cut.resize(3 * call.across * g.padded), units.resize(blocks * call.across);
      for (int64_t m = 0; m < g.m; ++m) ready<f32>(rows, m, numbers.data() + m * g.padded, sums.data());
      std::vector<uint8_t> refused(panels);
      digits_tiled(numbers.data(), g.m, g.padded, *wants(), call.across, cut.data(), units.data(), refused.data(), 0,
                   tasks_of_tiled(g.m, g.padded));
      in_tiles = std::count(refused.begin(), refused.end(), 0) == panels;
      call.digits = in_tiles ? cut.data() : nullptr, call.steps = units.data();
    }
    if (in_tiles) {
      // Nothing else reads x.
    } else if (g.codes != 0 && wants()->tiles) {
      std::vector<int8_t> as_given(g.m * g.padded);
      for (int64_t m = 0; m < g.m; ++m) ready<i8>(rows, m, as_given.data() + m * g.padded, sums.data());
      codes.resize(call.across * g.padded);
      bytes_tiled(as_given.data(), g.m, g.padded, g.padded, codes.data(), 0, tasks_of_tiled(g.m, g.padded));
      call.panels = codes.data();
    } else if (g.codes == 0) {
      numbers.resize(call.across * g.padded);
      turned<f32, float>(rows, *wants(), 0, panels, numbers.data(), sums.data());
      call.panels = numbers.data();
    } else if (wants()->size == 1) {
      codes.resize(call.across * g.padded);
      turned<i8, int8_t>(rows, *wants(), 0, panels, codes.data(), sums.data());
      call.panels = codes.data();
    } else {
      wide.resize(call.across * g.padded);
      turned<i8, int8_t>(rows, *wants(), 0, panels, wide.data(), sums.data());
      call.panels = wide.data();
    }
    turned_sums(rows, call.across, sums.data(), turned_);
    call.sum_panels = turned_.data();
  } else if (g.codes != 0) {
    codes.resize(g.m * g.padded);
    for (int64_t m = 0; m < g.m; ++m) ready<i8>(rows, m, codes.data() + m * g.padded, sums.data());
    call.x = codes.data();
  } else {
    numbers.resize(g.m * g.padded);
    for (int64_t m = 0; m < g.m; ++m) ready<f32>(rows, m, numbers.data() + m * g.padded, sums.data());
    call.x = numbers.data();
    const bool alone = g.m == 1 && wants()->digits > 0;
    if (!(alone && in_digits(numbers.data(), g.padded, *wants(), digits, call)))
      placed(numbers.data(), g.m * g.padded, rows);
  }
  call.x_sums = sums.data();
  for (int64_t i = 0; i < g.repeats; ++i) turn ? many(&call, 0, g.n, 0, g.m) : run(&call, 0, g.n);
  std::FILE* result = std::fopen(names[2], "wb");
  if (result == nullptr || std::fwrite(y.data(), 1, y.size(), result) != y.size()) return 3;
  std::fclose(result);
  for (void* part : parts) std::free(part);
  return 0;
}
