// A convolution by itself, without torch: reads one call from a file, writes its results; what emulators run.
// In: numbers as below, then x, panels, factors, bias, for each result what codes are worth and where they start, vectors
// one behind the other, for each tensor that is read what its codes are worth and the code for 0, and these tensors; each
// behind its size in bytes.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "conv.h"

using namespace bitfold;
extern "C" void run(const Conv*, int64_t, int64_t, int64_t, int64_t);
extern "C" int bytes();
extern "C" void widen(const Conv*, int16_t*);

struct Given {
  int64_t images, height, width, channels, out_height, out_width, n, kernel_height, kernel_width, stride_y, stride_x, top,
      left, dilation_y, dilation_x, groups, rows, depth, zero, panel, writes, coded,
      reads, vectors;
};

// The next part of a call, in memory of just its size.
std::vector<char> part(FILE* file) {
  int64_t size;
  if (std::fread(&size, 8, 1, file) != 1) std::exit(2);
  std::vector<char> found(size);
  if (size > 0 && std::fread(found.data(), size, 1, file) != 1) std::exit(2);
  return found;
}

int main(int, char** names) {
  FILE* file = std::fopen(names[1], "rb");
  Given g;
  if (file == nullptr || std::fread(&g, sizeof g, 1, file) != 1) return 2;
  const std::vector<char> x = part(file), codes = part(file), factors = part(file), bias = part(file),
                          inverses = part(file), starts = part(file), vectors = part(file), units = part(file),
                          origins = part(file);
  std::vector<std::vector<char>> reads;
  for (int64_t i = 0; i < g.reads; ++i) reads.push_back(part(file));
  std::fclose(file);
  Conv c{};
  c.x = reinterpret_cast<const int8_t*>(x.data()), c.zero = static_cast<int32_t>(g.zero);
  c.images = g.images, c.height = g.height, c.width = g.width, c.channels = g.channels;
  c.out_height = g.out_height, c.out_width = g.out_width, c.n = g.n;
  c.kernel_height = g.kernel_height, c.kernel_width = g.kernel_width, c.stride_y = g.stride_y, c.stride_x = g.stride_x;
  c.top = g.top, c.left = g.left, c.dilation_y = g.dilation_y, c.dilation_x = g.dilation_x;
  c.groups = g.groups, c.rows = g.rows, c.depth = g.depth, c.apart = g.depth;
  c.factors = reinterpret_cast<const float*>(factors.data()), c.bias = reinterpret_cast<const float*>(bias.data());
  for (int64_t i = 0; i < g.vectors; ++i)
    c.vectors[i] = reinterpret_cast<const float*>(vectors.data()) + i * (c.n + kChannels);
  for (int64_t i = 0; i < g.reads; ++i) {
    c.reads[i] = reads[i].data();
    c.units[i] = reinterpret_cast<const float*>(units.data())[i];
    c.origins[i] = reinterpret_cast<const float*>(origins.data())[i];
  }
  std::vector<const uint8_t*> panels(c.groups * c.panels_of_group());
  for (size_t i = 0; i < panels.size(); ++i)
    panels[i] = reinterpret_cast<const uint8_t*>(codes.data()) + i * g.panel;
  c.panels = panels.data();
  std::vector<std::vector<char>> results;
  for (int64_t i = 0; i < g.writes; ++i) {
    results.emplace_back(c.pixels() * c.n * (g.coded >> i & 1 ? 1 : sizeof(float)));
    c.writes[i] = results.back().data();
    c.inverses[i] = reinterpret_cast<const float*>(inverses.data())[i];
    c.starts[i] = reinterpret_cast<const int32_t*>(starts.data())[i];
  }
  std::vector<int16_t> wide;
  if (bytes() == 2) {
    c.apart = (c.depth + 3) / 4 * 4;
    wide.resize(c.images * c.height * c.width * c.groups * c.apart);
    widen(&c, wide.data());
    c.x = reinterpret_cast<const int8_t*>(wide.data()), c.channels = c.groups * c.apart;
  }
  const std::vector<int8_t> zeros(2 * c.channels + 64, bytes() == 2 ? 0 : static_cast<int8_t>(g.zero));
  c.zeros = zeros.data();
  run(&c, 0, c.pixels(), 0, static_cast<int64_t>(panels.size()));
  std::FILE* result = std::fopen(names[2], "wb");
  if (result == nullptr) return 3;
  for (const auto& one : results)
    if (std::fwrite(one.data(), 1, one.size(), result) != one.size()) return 3;
  std::fclose(result);
  return 0;
}
