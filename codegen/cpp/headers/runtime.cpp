// The operator `bitfold::fused` on CPU tensors: finds the kernel of a text, makes x ready, runs it on torch's
// threads. Compiled once for a machine, against torch's stable interface.
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
#include "digits.h"
#include "numbers.h"
#include "ready.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace bitfold {

using Run = void (*)(const Call*, int64_t, int64_t);
using Build = int (*)(const char* text);

// What a spec says, in numbers; `codegen/cpp/build.py` fills one in.
struct Facts {
  Run run;   // a few rows of x
  Run many;  // many, from panels; null where x has a scale for each block
  const Wants* (*wants)();
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

struct Scratch {
  std::vector<float> numbers, sums, turned, scales;
  std::vector<int8_t> codes;
  std::vector<int16_t> panels;
  Digits digits;
  // A long prompt's copy is not kept for the tokens after it.
  void trim() {
    constexpr size_t most = 16 << 20;
    if (numbers.capacity() * sizeof(float) > most) std::vector<float>().swap(numbers);
    if (panels.capacity() * sizeof(int16_t) > most) std::vector<int16_t>().swap(panels);
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

// From so many rows of x on, they are turned into panels and rows of the weight decoded once for all of them.
constexpr int64_t kMany = 9;

template <class From, class To, class Out>
void all_turned(const Rows& rows, const Wants& wants, Out* panels, float* sums) {
  torch::stable::parallel_for(0, (rows.m + wants.width - 1) / wants.width, 1, [&](int64_t first, int64_t last) {
    turned<From, To>(rows, wants, first, last, panels, sums);
  });
}

void many(Call& call, const Facts& f, const Rows& rows, Scratch& scratch) {
  const Wants& wants = *f.wants();
  call.across = (call.m + wants.width - 1) / wants.width * wants.width;
  float* sums = scratch.sums.data();
  if (f.codes) {
    scratch.panels.resize(call.across * f.padded);
    int16_t* to = scratch.panels.data();
    if (wants.size == 1)
      all_turned<i8, int8_t>(rows, wants, reinterpret_cast<int8_t*>(to), sums);
    else
      all_turned<i8, int8_t>(rows, wants, to, sums);
    call.panels = to;
  } else {
    scratch.numbers.resize(call.across * f.padded);
    float* to = scratch.numbers.data();
    if (f.x == 0) all_turned<f32, float>(rows, wants, to, sums);
    if (f.x == 1) all_turned<bf16, float>(rows, wants, to, sums);
    if (f.x == 2) all_turned<f16, float>(rows, wants, to, sums);
    call.panels = to;
  }
  turned_sums(rows, call.across, sums, scratch.turned);
  call.sum_panels = scratch.turned.data();
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
  call.scale_count = f.scale_count;

  thread_local Scratch scratch;
  scratch.trim();
  const Rows rows = {x.const_data_ptr(), call.m, f.k, f.padded, f.sum_cols, f.wants()->order};
  scratch.sums.resize(call.m * rows.sums());
  call.x_sums = scratch.sums.data();
  float* sums = scratch.sums.data();
  bool turn = call.m >= kMany && f.many != nullptr;
  const bool as_it_lies = kind == ScalarType::Float && f.padded == f.k && f.sum_cols == 0;
  const bool alone = call.m == 1 && f.wants()->digits > 0;
  if (turn) {
    // `many` below.
  } else if (f.codes) {
    scratch.codes.resize(call.m * f.padded);
    for (int64_t m = 0; m < call.m; ++m) ready<i8>(rows, m, scratch.codes.data() + m * f.padded, sums);
    call.x = scratch.codes.data();
  } else if (as_it_lies && rows.order == nullptr && !alone) {
    call.x = rows.x;
  } else if (alone && as_it_lies && in_digits(static_cast<const float*>(rows.x), f.padded, *f.wants(), scratch.digits,
                                              call)) {
    // Nothing else reads x.
  } else {
    scratch.numbers.resize(call.m * f.padded);
    for (int64_t m = 0; m < call.m; ++m) {
      float* to = scratch.numbers.data() + m * f.padded;
      if (kind == ScalarType::Float) ready<f32>(rows, m, to, sums);
      if (kind == ScalarType::BFloat16) ready<bf16>(rows, m, to, sums);
      if (kind == ScalarType::Half) ready<f16>(rows, m, to, sums);
    }
    call.x = scratch.numbers.data();
    if (!(alone && !as_it_lies && in_digits(scratch.numbers.data(), f.padded, *f.wants(), scratch.digits, call)))
      for (int64_t m = 0; m < call.m && rows.order != nullptr; ++m)
        placed(scratch.numbers.data() + m * f.padded, f.padded, rows.order);
    // What is added to codes is multiplied by a sum of x. An infinity in it meets codes that are zero, or of the other
    // sign, where no value is: then values are multiplied, decoded whole.
    const auto finite = [](float sum) { return std::isfinite(sum); };
    turn = f.many != nullptr && !std::all_of(scratch.sums.begin(), scratch.sums.end(), finite);
  }
  if (turn) many(call, f, rows, scratch);
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
    STD_TORCH_CHECK(inputs[next].numel() == f.n * f.stride && inputs[next].element_size() == 1, "the kernel ", text,
                    " reads ", f.n, " rows of ", f.stride, " bytes of codes");
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
  if (turn) {
    const int64_t each = f.wants()->rows;
    torch::stable::parallel_for(0, (f.n + each - 1) / each, 1, [&](int64_t first, int64_t last) {
      f.many(&call, each * first, std::min(each * last, f.n));
    });
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
