// The operator `bitfold::conv` on CPU tensors: finds the kernel of a text, lays out what it reads, runs it on torch's
// threads. Compiled once for a machine, against torch's stable interface.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <vector>

#include "called.h"
#include "conv.h"
#include "keeps.h"
#include "known.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace bitfold {

using Run = void (*)(const Conv*, int64_t, int64_t, int64_t, int64_t);

// What a spec says, in numbers; `codegen/cpp/conv_build.py` fills one in. Its name is not that of another operator: all of
// them see each other's symbols, and templates over types of one name would be taken for the same.
struct ConvFacts {
  Run run;
  void (*widen)(const Conv*, int16_t*);  // makes x ready; null where it is read as it is
  int64_t n, k, kernel_height, kernel_width, stride_y, stride_x, top, left, bottom, right, dilation_y, dilation_x, groups;
  int64_t row_bytes, scales;           // bytes of a row of codes; scales of the weight
  int32_t product, depthwise, bias, positive;  // product: x is rows; positive: no code of x is negative
  int32_t reads, vectors, writes;      // how many
  int32_t norm;                        // the first two vectors are a batch norm's scale and shift
  int32_t read_codes, write_codes;     // a bit for each: whether it is codes
  int32_t zero, read_zeros, write_zeros;  // whether x's codes have a zero point; a bit for each: whether its codes do
};

namespace {

Known<ConvFacts> known;

using Sizes = std::vector<int64_t>;

// Strides of a tensor whose second dimension is innermost; of rows, those of a contiguous one.
Sizes strides(const Sizes& shape, bool product) {
  Sizes order, found(shape.size(), 1);
  for (size_t i = 0; i < shape.size(); ++i)
    if (product || i != 1) order.push_back(i);
  if (!product) order.push_back(1);
  int64_t step = 1;
  for (size_t i = order.size(); i-- > 0;) found[order[i]] = step, step *= std::max<int64_t>(shape[order[i]], 1);
  return found;
}

Tensor fresh(const Sizes& shape, const Sizes& steps, bool codes) {
  AtenTensorHandle handle;
  require(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), steps.data(),
                                           codes ? aoti_torch_dtype_uint8() : aoti_torch_dtype_float32(),
                                           aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS,
                  "no memory for the result");
  return Tensor(handle);
}

// x's numbers in that order, in memory of its own if they lie otherwise or if a kernel may read behind the last.
template <class T> struct Laid {
  std::vector<T> held;
  const T* at = nullptr;

  void take(const Tensor& x, const Sizes& shape, bool product, bool behind) {
    const Sizes wanted = strides(shape, product);
    bool same = !behind;
    for (size_t i = 0; i < shape.size(); ++i) same = same && (shape[i] == 1 || x.stride(i) == wanted[i]);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    if (same) {
      at = from;
      return;
    }
    held.resize(x.numel() + 64);
    at = held.data();
    // images, rows, columns, channels: how many, and how far apart in x.
    int64_t count[4] = {1, 1, 1, 1}, step[4] = {0, 0, 0, 0};
    const size_t rank = shape.size();
    if (product) {
      count[3] = shape[rank - 1], step[3] = x.stride(rank - 1);
      for (size_t i = 0; i + 1 < rank; ++i) count[2] *= shape[i];
      step[2] = count[3];
    } else {
      count[0] = shape[0], step[0] = x.stride(0), count[3] = shape[1], step[3] = x.stride(1);
      count[2] = shape[rank - 1], step[2] = x.stride(rank - 1);
      if (rank == 4) count[1] = shape[2], step[1] = x.stride(2);
    }
    T* to = held.data();
    for (int64_t i = 0; i < count[0]; ++i)
      for (int64_t y = 0; y < count[1]; ++y, to += count[2] * count[3]) {
        const T* line = from + i * step[0] + y * step[1];
        if (step[3] == 1 && step[2] == count[3]) {
          std::copy_n(line, count[2] * count[3], to);
          continue;
        }
        if (count[3] == 3 && step[2] == 1) {  // an image's colours, which a loop of one channel each takes twice as long for
          const T *const red = line, *const green = line + step[3], *const blue = line + 2 * step[3];
          for (int64_t j = 0; j < count[2]; ++j) to[3 * j] = red[j], to[3 * j + 1] = green[j], to[3 * j + 2] = blue[j];
          continue;
        }
        for (int64_t c = 0; c < count[3]; ++c)
          for (int64_t j = 0; j < count[2]; ++j) to[j * count[3] + c] = line[j * step[2] + c * step[3]];
      }
  }
};

struct Scratch {
  Laid<int8_t> x, codes[kReads];
  Laid<float> floats[kReads];
  std::vector<int8_t> zeros;
  std::vector<int16_t> wide;
  std::vector<float> numbers;
  std::vector<const uint8_t*> panels;
  std::vector<uint8_t> widened;
  // Images of one large call are not kept for those after it.
  void trim(size_t wanted) {
    gives_back(x.held, wanted), gives_back(wide, wanted);
    for (auto& one : codes) gives_back(one.held, wanted);
    for (auto& one : floats) gives_back(one.held, wanted);
  }
};

float one(const Tensor& scale, const std::string& text) {
  require(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "the kernel ", text,
                  " takes one scale a tensor in float32");
  return static_cast<const float*>(scale.const_data_ptr())[0];
}

int32_t origin(const Tensor& zero, const std::string& text) {
  require(zero.numel() == 1 && zero.scalar_type() == ScalarType::Char, "the kernel ", text,
                  " takes one zero point a tensor in int8");
  return static_cast<const int8_t*>(zero.const_data_ptr())[0];
}

const float* padded(std::vector<float>& all, size_t& used, const Tensor& given, const ConvFacts& f, const std::string& text) {
  require(given.numel() == f.n && given.scalar_type() == ScalarType::Float && given.is_contiguous(),
                  "the kernel ", text, " reads ", f.n, " float32 numbers, one a channel");
  float* to = all.data() + used;
  std::copy_n(static_cast<const float*>(given.const_data_ptr()), f.n, to);
  used += f.n + kChannels;
  return to;
}

// Addresses of panels; narrow ones, which end a group, are copied and filled with rows of zeros.
void panels(Conv& c, const ConvFacts& f, const uint8_t* codes, Scratch& s) {
  const int64_t each = c.panels_of_group(), narrow = c.rows % kChannels, size = kChannels * f.row_bytes;
  const int64_t unit = f.depthwise ? 1 : 4;
  s.panels.resize(c.groups * each);
  s.widened.assign(narrow ? c.groups * size : 0, 0);
  for (int64_t g = 0; g < c.groups; ++g) {
    const uint8_t* group = codes + g * c.rows * f.row_bytes;
    for (int64_t p = 0; p < each; ++p) s.panels[g * each + p] = group + p * size;
    if (!narrow) continue;
    const uint8_t* from = group + (each - 1) * size;
    uint8_t* to = s.widened.data() + g * size;
    for (int64_t i = 0; i < f.row_bytes / unit; ++i)
      std::memcpy(to + i * kChannels * unit, from + i * narrow * unit, narrow * unit);
    s.panels[g * each + each - 1] = to;
  }
  c.panels = s.panels.data();
}

// A task has work for a while, and the weight that it reads stays in a core's cache.
#if defined(BITFOLD_TILES)
constexpr int64_t kLeast = 1 << 19, kCached = 1 << 18;
#else
constexpr int64_t kLeast = 1 << 17, kCached = 1 << 16;
#endif

void spread(const Conv& c, const ConvFacts& f) {
  const int64_t count = c.groups * c.panels_of_group(), pixels = c.pixels();
  int64_t together = count, rows;
  const int64_t threads = torch::stable::get_num_threads();
  if (f.depthwise) {  // whole lines; a task puts its weights in order first, so there are few
    const int64_t lines = pixels / c.out_width;
    rows = c.out_width * (threads == 1 ? lines : std::max<int64_t>(1, lines / (4 * threads)));
  } else {
    together = std::min(count, std::max<int64_t>(1, kCached / (kChannels * f.row_bytes)));
    const int64_t work = kChannels * f.row_bytes * together;  // products of a pixel
    rows = std::max<int64_t>(16 * kPixels, kLeast / (work + 1));
  }
  const int64_t across = (count + together - 1) / together, down = (pixels + rows - 1) / rows;
  const int64_t work = kChannels * f.row_bytes * together * std::min(rows, pixels);
  const int64_t grain = 1 + kLeast / (work + 1);
  const auto some = [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t from = task / down * together, pixel = task % down * rows;
      f.run(&c, pixel, std::min(pixel + rows, pixels), from, std::min(from + together, count));
    }
  };
  if (threads == 1 || across * down == 1) return some(0, across * down);
  torch::stable::parallel_for(0, across * down, grain, some);
}

std::vector<Tensor> conv(std::vector<Tensor> inputs, std::string text) {
  const ConvFacts f = known.of(text);
  const auto bits = [](int32_t of) { return __builtin_popcount(of); };
  const size_t wanted = 4 + f.zero + f.bias + f.reads + bits(f.read_codes) + bits(f.read_zeros) + f.vectors +
                        bits(f.write_codes) + bits(f.write_zeros);
  require(inputs.size() == wanted, "the kernel ", text, " takes ", wanted, " tensors, not ", inputs.size());
  if (f.product)
    for (auto& rows : inputs)
      if (!rows.is_contiguous()) rows = torch::stable::contiguous(rows);
  const Tensor& x = inputs[0];
  const Sizes given(x.sizes().begin(), x.sizes().end());
  const size_t last = f.product ? given.size() - 1 : 1;
  require(f.product ? !given.empty() : given.size() == 3 || given.size() == 4, "the kernel ", text,
                  f.product ? " takes x [.., K]" : " takes x [images, channels, height, width], or no height");
  require(x.scalar_type() == ScalarType::Byte && given[last] == f.k * f.groups, "the kernel ", text, " takes ",
                  f.k * f.groups, " channels of codes as uint8");
  Conv c{};
  c.n = f.n, c.groups = f.depthwise ? 1 : f.groups, c.rows = f.n / c.groups, c.depth = f.k, c.apart = f.k;
  c.kernel_height = f.kernel_height, c.kernel_width = f.kernel_width;
  c.stride_y = f.stride_y, c.stride_x = f.stride_x, c.top = f.top, c.left = f.left;
  c.dilation_y = f.dilation_y, c.dilation_x = f.dilation_x;
  c.channels = f.k * f.groups;
  Sizes shape = given;
  if (f.product) {
    c.images = 1, c.height = 1, c.width = 1;
    for (size_t i = 0; i < last; ++i) c.width *= given[i];
    c.out_height = 1, c.out_width = c.width;
    shape.back() = f.n;
  } else {
    require(given.size() == 4 || (f.kernel_height == 1 && f.stride_y == 1 && f.top + f.bottom == 0 && f.dilation_y == 1),
            "the kernel ", text, " is of two dimensions, and takes x [images, channels, height, width]");
    c.images = given[0], c.height = given.size() == 4 ? given[2] : 1, c.width = given.back();
    const auto size = [](int64_t length, int64_t begin, int64_t end, int64_t dilation, int64_t kernel, int64_t stride) {
      return (length + begin + end - dilation * (kernel - 1) - 1) / stride + 1;
    };
    require(c.height + f.top + f.bottom > f.dilation_y * (f.kernel_height - 1) &&
                        c.width + f.left + f.right > f.dilation_x * (f.kernel_width - 1),
                    "the kernel ", text, " is larger than its padded image");
    c.out_height = size(c.height, f.top, f.bottom, f.dilation_y, f.kernel_height, f.stride_y);
    c.out_width = size(c.width, f.left, f.right, f.dilation_x, f.kernel_width, f.stride_x);
    shape[1] = f.n, shape.back() = c.out_width;
    if (given.size() == 4) shape[2] = c.out_height;
  }
  const Sizes steps = strides(shape, f.product);
  std::vector<Tensor> results;
  for (int i = 0; i < f.writes; ++i) {
    results.push_back(fresh(shape, steps, f.write_codes >> i & 1));
    c.writes[i] = results.back().mutable_data_ptr();
  }
  if (c.pixels() == 0) return results;

  thread_local Scratch s;
  s.trim(std::max<int64_t>(x.numel(), c.pixels() * c.n));
  const float unit = one(inputs[1], text);
  require(!(f.positive && unit < 0), "the kernel ", text, " takes codes whose scale is not negative");
  if (f.zero) c.zero = origin(inputs[2], text);
  const Tensor &codes = inputs[2 + f.zero], &scales = inputs[3 + f.zero];
  require(codes.numel() == f.n * f.row_bytes && codes.scalar_type() == ScalarType::Byte && codes.is_contiguous(),
                  "the kernel ", text, " reads ", f.n, " rows of ", f.row_bytes, " bytes of codes");
  require(scales.numel() == f.scales && scales.scalar_type() == ScalarType::Float && scales.is_contiguous(),
                  "the kernel ", text, " reads ", f.scales, " scales in float32");
  s.numbers.resize((2 + f.vectors) * (f.n + kChannels));  // what lies behind the last channel is never kept
  size_t used = 0, next = 4 + f.zero;
  const float* of_weight = static_cast<const float*>(scales.const_data_ptr());
  float* const factors = s.numbers.data();
  if (f.scales == 1)
    std::fill_n(factors, f.n, unit * of_weight[0]);
  else
    for (int64_t i = 0; i < f.n; ++i) factors[i] = unit * of_weight[i];
  c.factors = s.numbers.data();
  used += f.n + kChannels;
  c.bias = s.numbers.data() + used;
  if (f.bias)
    padded(s.numbers, used, inputs[next++], f, text);
  else
    std::fill_n(s.numbers.data() + used, f.n, 0.0f), used += f.n + kChannels;
  for (int i = 0; i < f.reads; ++i) {
    const Tensor& read = inputs[next++];
    const bool coded = f.read_codes >> i & 1;
    const Sizes has(read.sizes().begin(), read.sizes().end());
    require(has == shape && read.scalar_type() == (coded ? ScalarType::Byte : ScalarType::Float), "the kernel ",
                    text, " reads a tensor of the result's shape, in float32 or in codes as it says");
    if (coded) {
      s.codes[i].take(read, shape, f.product, false);
      c.reads[i] = s.codes[i].at;
      c.units[i] = one(inputs[next++], text);
      if (f.read_zeros >> i & 1) c.origins[i] = static_cast<float>(origin(inputs[next++], text));
    } else {
      s.floats[i].take(read, shape, f.product, false);
      c.reads[i] = s.floats[i].at;
    }
  }
  for (int i = 0; i < f.vectors; ++i) c.vectors[i] = padded(s.numbers, used, inputs[next++], f, text);
  if (f.norm) {
    float* const bias = factors + f.n + kChannels;
    for (int64_t i = 0; i < f.n; ++i) {
      factors[i] *= c.vectors[0][i];
      bias[i] = bias[i] * c.vectors[0][i] + c.vectors[1][i];
    }
  }
  for (int i = 0; i < f.writes; ++i) {
    if (!(f.write_codes >> i & 1)) continue;
    const float scale = one(inputs[next++], text);
    c.inverses[i] = scale == 0.0f ? 0.0f : 1.0f / scale;
    if (f.write_zeros >> i & 1) c.starts[i] = origin(inputs[next++], text);
  }

  // Channels are read four, or sixteen, at a time: those of the last pixel may end before.
  const int64_t unit_of_x = f.depthwise ? kChannels : 4;
  const int64_t multiple = f.depthwise ? f.n / f.groups : 1;
  if (multiple > 1) {  // several results of a channel: the channel so many times
    s.x.take(x, given, f.product, false);
    const int64_t pixels = c.images * c.height * c.width;
    std::vector<int8_t> many(pixels * f.n + 64);
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t i = 0; i < f.n; ++i) many[p * f.n + i] = s.x.at[p * c.channels + i / multiple];
    s.x.held.swap(many);
    s.x.at = s.x.held.data();
    c.channels = f.n;
  } else {
    const bool behind = f.k * (f.depthwise ? f.groups : 1) % unit_of_x != 0;
    s.x.take(x, given, f.product, behind && f.widen == nullptr);
  }
  c.x = s.x.at;
  if (f.widen != nullptr) {
    c.apart = (f.k + 3) / 4 * 4;
    s.wide.resize(c.images * c.height * c.width * c.groups * c.apart);
    f.widen(&c, s.wide.data());
    c.x = reinterpret_cast<const int8_t*>(s.wide.data());
    c.channels = c.groups * c.apart;
  }
  if (!f.product) s.zeros.assign(2 * c.channels + 64, f.widen != nullptr ? 0 : static_cast<int8_t>(c.zero));
  c.zeros = s.zeros.data();
  panels(c, f, static_cast<const uint8_t*>(codes.const_data_ptr()), s);
  spread(c, f);
  return results;
}

}  // namespace
}  // namespace bitfold

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) { m.impl("conv", TORCH_BOX(&bitfold::conv)); }

// The same for C++ that Inductor writes, as many results as the text says: no dispatcher in between.
extern "C" AOTITorchError aoti_torch_cpu_conv(const AtenTensorHandle* inputs, int64_t count, const char* text,
                                              AtenTensorHandle* y0, AtenTensorHandle* y1, AtenTensorHandle* y2,
                                              AtenTensorHandle* y3, AtenTensorHandle* y4, AtenTensorHandle* y5,
                                              AtenTensorHandle* y6, AtenTensorHandle* y7) {
  static_assert(bitfold::kWrites == 8);
  AtenTensorHandle* const to[] = {y0, y1, y2, y3, y4, y5, y6, y7};
  return bitfold::called(inputs, count, to, bitfold::kWrites,
                         [&](auto given) { return bitfold::conv(std::move(given), text); });
}

BITFOLD_KNOWN(conv_runtime, bitfold::ConvFacts)
