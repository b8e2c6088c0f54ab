// The operator `bitfold::fused` on CPU tensors: finds the kernel of a text, makes x ready, runs it on torch's
// threads. Compiled once for a machine, against torch's stable interface.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel.h"
#include VECTORS
#include "numbers.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace bitfold {

using Run = void (*)(const Call*, int64_t, int64_t);
using Decode = void (*)(const Call*, int, int64_t, int64_t, float*);
using End = void (*)(const Call*, int64_t, int64_t, const float* const*, int64_t, int64_t);
using Build = int (*)(const char* text);

// What a spec says, in numbers; `codegen/cpp/build.py` fills one in.
struct Facts {
  Run run;
  Decode decode;  // null where activations come in codes
  End end;
  int64_t n, k, padded, stride, scale_row, scale_group, groups, sum_cols;
  int32_t weights, parts, scales, zeros, level;  // the last three: places among a weight's parts, or -1
  int32_t bias, matrices, vectors, codes, out;   // codes: x comes in int8; out: 0 float32, 1 bfloat16, 2 float16
  int32_t token_scales;                          // of x: 0 none, 1 for all, else one more than a row has
  int32_t x;                                     // 0 float32, 1 bfloat16, 2 float16: of biases and extras too
  int64_t scale_count, scale_bytes, zero_bytes;  // numbers of a weight's scales, and the size of one
};

namespace {

std::shared_mutex guard;
std::unordered_map<std::string, Facts> known;
Build build = nullptr;

bool find(const std::string& text, Facts& found) {
  std::shared_lock<std::shared_mutex> lock(guard);
  const auto at = known.find(text);
  if (at == known.end()) return false;
  found = at->second;
  return true;
}

// Rows of x as a kernel reads them: padded with zeros; and sums over groups where they are needed.
template <class From, class To>
void ready(const void* x, const Facts& f, int64_t m, To* to, float* sums) {
  const int64_t cols = f.sum_cols < 0 ? f.k : f.sum_cols;
  for (int64_t row = 0; row < m; ++row) {
    To* r = to + row * f.padded;
    for (int64_t i = 0; i < f.k; ++i) r[i] = static_cast<To>(From::get(x, row * f.k + i));
    std::fill(r + f.k, r + f.padded, To(0));
    if (f.sum_cols == 0) continue;
    for (int64_t g = 0; g < f.k / cols; ++g) {
      if constexpr (std::is_same_v<To, float>) {
        float lanes[16] = {};  // as a vector adds, so that long groups lose no more than its sums do
        for (int64_t i = 0; i < cols; ++i) lanes[i % 16] += r[g * cols + i];
        float all = 0;
        for (float lane : lanes) all += lane;
        sums[row * (f.k / cols) + g] = all;
      } else {
        int64_t all = 0;
        for (int64_t i = 0; i < cols; ++i) all += r[g * cols + i];
        sums[row * (f.k / cols) + g] = static_cast<float>(all);
      }
    }
  }
}

struct Scratch {
  std::vector<float> numbers, sums, scales;
  std::vector<int8_t> codes;
  // A long prompt's copy is not kept for the tokens after it.
  void trim() {
    constexpr size_t most = 16 << 20;
    if (numbers.capacity() * sizeof(float) > most) std::vector<float>().swap(numbers);
    if (codes.capacity() > most) std::vector<int8_t>().swap(codes);
  }
};

// Straight to the allocator: through the dispatcher it takes a third of a small product's time.
Tensor fresh(const std::vector<int64_t>& shape, int32_t out) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  const int32_t kinds[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), kinds[out],
                                           aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS,
                  "no memory for the result");
  return Tensor(handle);
}

// Past so many rows of x the library's product of decoded rows is faster than the kernel.
constexpr int64_t kMostRows = 24;
// Decoded rows that are multiplied at a time: what fits a core's cache.
constexpr int64_t kDecoded = 1 << 20;

// Decoded a stretch of rows at a time, multiplied by the library, ended by the kernel.
void many(const Call& call, const Facts& f, const Tensor& like) {
  const int64_t each = std::max<int64_t>(16, kDecoded / 4 / call.k);
  const auto floats = [&](const float* at, int64_t rows, int64_t cols, int64_t stride) {
    return torch::stable::from_blob(const_cast<float*>(at), {rows, cols}, {stride, 1}, like.device(), ScalarType::Float);
  };
  const Tensor x = floats(static_cast<const float*>(call.x), call.m, call.k, call.padded);
  std::vector<float> decoded(std::min(each, call.n) * call.k);
  for (int64_t first = 0; first < call.n; first += each) {
    const int64_t count = std::min(each, call.n - first);
    std::vector<Tensor> products;
    const float* sums[kWeights];
    const std::vector<int64_t> shape = {call.m, count};
    for (int w = 0; w < f.weights; ++w) {
      torch::stable::parallel_for(0, count, 8, [&](int64_t a, int64_t b) {
        f.decode(&call, w, first + a, first + b, decoded.data() + a * call.k);
      });
      const Tensor weight = floats(decoded.data(), count, call.k, call.k);
      const Tensor turned = torch::stable::transpose(weight, 0, 1);
      products.push_back(fresh(shape, 0));
      // Not through the dispatcher: autocast would make another dtype of it.
      STD_TORCH_CHECK(aoti_torch_cpu_mm_out(products.back().get(), x.get(), turned.get()) == AOTI_TORCH_SUCCESS,
                      "the library refused a product of ", call.m, " x ", call.k, " x ", count);
      sums[w] = static_cast<const float*>(products.back().const_data_ptr());
    }
    torch::stable::parallel_for(0, call.m, 8, [&](int64_t a, int64_t b) { f.end(&call, first, count, sums, a, b); });
  }
}

std::vector<Tensor> fused(std::vector<Tensor> inputs, std::string text) {
  Facts f;
  if (!find(text, f)) {
    STD_TORCH_CHECK(build != nullptr && build(text.c_str()) == 0 && find(text, f),
                    "no CPU kernel could be built for ", text, "; lower the graph with target cpu");
  }
  const size_t wanted = 1 + (f.token_scales != 0) + size_t(f.weights) * (f.parts + f.bias) + f.matrices + f.vectors;
  STD_TORCH_CHECK(inputs.size() == wanted, "the kernel ", text, " takes ", wanted, " tensors, not ", inputs.size());
  for (auto& given : inputs)
    if (!given.is_contiguous()) given = torch::stable::contiguous(given);
  const Tensor& x = inputs[0];
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) == f.k, "the kernel ", text, " takes x [.., ", f.k, "]");
  const auto kind = x.scalar_type();
  const ScalarType kinds[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  STD_TORCH_CHECK(kind == (f.codes ? ScalarType::Byte : kinds[f.x]), "the kernel ", text,
                  " does not take x in this dtype");
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(f.n);
  const Tensor y = fresh(shape, f.out);
  Call call{};
  call.m = x.numel() / f.k;
  if (call.m == 0) return {y};
  call.n = f.n, call.k = f.k, call.padded = f.padded;
  call.stride = f.stride, call.scale_row = f.scale_row, call.scale_group = f.scale_group, call.groups = f.groups;

  thread_local Scratch scratch;
  scratch.trim();
  const int64_t groups = f.sum_cols == 0 ? 0 : f.sum_cols < 0 ? 1 : f.k / f.sum_cols;
  scratch.sums.resize(call.m * groups);
  call.x_sums = scratch.sums.data();
  const void* given = x.const_data_ptr();
  if (f.codes) {
    scratch.codes.resize(call.m * f.padded + 64);
    ready<i8>(given, f, call.m, scratch.codes.data(), scratch.sums.data());
    call.x = scratch.codes.data();
  } else if (kind == ScalarType::Float && f.padded == f.k && f.sum_cols == 0) {
    call.x = given;
  } else {
    scratch.numbers.resize(call.m * f.padded + 16);
    float* to = scratch.numbers.data();
    if (kind == ScalarType::Float) ready<f32>(given, f, call.m, to, scratch.sums.data());
    if (kind == ScalarType::BFloat16) ready<bf16>(given, f, call.m, to, scratch.sums.data());
    if (kind == ScalarType::Half) ready<f16>(given, f, call.m, to, scratch.sums.data());
    call.x = to;
  }
  size_t next = 1;
  if (f.token_scales != 0) {
    const Tensor& scales = inputs[next++];
    const int64_t count = f.token_scales == 1 ? 1 : call.m * (f.token_scales - 1);
    STD_TORCH_CHECK(scales.numel() == count && scales.scalar_type() == ScalarType::Float, "the kernel ", text,
                    " takes ", count, " scales of x in float32");
    call.x_scales = static_cast<const float*>(scales.const_data_ptr());
    if (f.token_scales == 1) {
      scratch.scales.assign(call.m, call.x_scales[0]);
      call.x_scales = scratch.scales.data();
    }
  }
  for (int w = 0; w < f.weights; ++w) {
    const auto part = [&](int at) { return at < 0 ? nullptr : inputs[next + at].const_data_ptr(); };
    const auto right = [&](int at, int64_t size) {
      return at < 0 || (inputs[next + at].numel() == f.scale_count && inputs[next + at].element_size() == size);
    };
    STD_TORCH_CHECK(right(f.scales, f.scale_bytes) && right(f.zeros, f.zero_bytes), "the kernel ", text, " reads ",
                    f.scale_count, " scales, in the dtype that its format stores");
    STD_TORCH_CHECK(f.level < 0 || inputs[next + f.level].scalar_type() == ScalarType::Float, "the kernel ", text,
                    " reads one scale of all scales in float32");
    STD_TORCH_CHECK(inputs[next].numel() == f.n * f.stride, "the kernel ", text, " reads ", f.n, " rows of ", f.stride,
                    " bytes of codes");
    call.weights[w].codes = static_cast<const uint8_t*>(part(0));
    call.weights[w].scales = part(f.scales);
    call.weights[w].zeros = part(f.zeros);
    call.weights[w].level = static_cast<const float*>(part(f.level));
    next += f.parts;
  }
  for (int w = 0; w < f.weights * f.bias; ++w) {
    STD_TORCH_CHECK(inputs[next].numel() == f.n && inputs[next].scalar_type() == kinds[f.x], "the kernel ", text,
                    " reads a bias of ", f.n, " numbers in x's dtype");
    call.weights[w].bias = inputs[next++].const_data_ptr();
  }
  for (int i = 0; i < f.matrices + f.vectors; ++i) {
    const int64_t count = i < f.matrices ? call.m * f.n : f.n;
    STD_TORCH_CHECK(inputs[next].numel() == count && inputs[next].scalar_type() == kinds[f.x], "the kernel ", text,
                    " reads ", count, " numbers beside its sums, in the result's dtype");
    call.extras[i] = inputs[next++].const_data_ptr();
  }
  call.y = y.mutable_data_ptr();
  if (call.m > kMostRows && f.decode != nullptr) {
    many(call, f, y);
    return {y};
  }
  // A task is worth starting for some thirty thousand codes, and takes four rows at a time.
  const int64_t tasks = (f.n + 3) / 4, each = 1 + (1 << 15) / (4 * f.k * f.weights + 1);
  torch::stable::parallel_for(0, tasks, each, [&](int64_t first, int64_t last) {
    f.run(&call, 4 * first, std::min(4 * last, f.n));
  });
  return {y};
}

}  // namespace
}  // namespace bitfold

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) { m.impl("fused", TORCH_BOX(&bitfold::fused)); }

// The same for C++ that Inductor writes: no dispatcher in between. Its tensors stay its own.
extern "C" AOTITorchError aoti_torch_cpu_fused(const AtenTensorHandle* inputs, int64_t count, const char* text,
                                               AtenTensorHandle* y) {
  try {
    std::vector<Tensor> given;
    given.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      AtenTensorHandle again;
      if (aoti_torch_new_tensor_handle(inputs[i], &again) != AOTI_TORCH_SUCCESS) return AOTI_TORCH_FAILURE;
      given.emplace_back(again);
    }
    const std::vector<Tensor> found = bitfold::fused(std::move(given), text);
    return aoti_torch_new_tensor_handle(found[0].get(), y);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}

extern "C" void bitfold_builder(bitfold::Build made) { bitfold::build = made; }
extern "C" void bitfold_know(const char* text, const bitfold::Facts* facts) {
  std::unique_lock<std::shared_mutex> lock(bitfold::guard);
  bitfold::known[text] = *facts;
}
