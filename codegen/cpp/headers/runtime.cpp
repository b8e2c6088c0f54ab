// The operator `bitfold::fused` on CPU tensors: finds the kernel of a text, makes x ready, runs it on torch's
// threads. Compiled once for a machine, against torch's stable interface.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <string>
#include <vector>

#include "kernel.h"
#include VECTORS
#include "call.h"
#include "called.h"
#include "known.h"
#include "pages.h"
#include "shares.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace bitfold {

namespace {

Known<Facts> known;
Pages pages;

// Straight to the allocator: through the dispatcher it would take a good part of what a small product does.
Tensor fresh(const std::vector<int64_t>& shape, int32_t out) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  const int32_t kinds[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  AtenTensorHandle handle;
  require(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), kinds[out],
                                           aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS,
                  "no memory for the result");
  return Tensor(handle);
}

// A product whose x is ready: what is left is to run it.
struct Prepared {
  Facts facts;
  Call call{};
  bool turn = false;  // by panels
  Tensor y;
  std::vector<Tensor> inputs;  // what the call points into
};

// beside: a product of the same x, made ready before; null if there is none.
Prepared prepared(std::vector<Tensor> given, const std::string& text, const Prepared* beside, Scratch& scratch) {
  Prepared to;
  to.inputs = std::move(given);
  std::vector<Tensor>& inputs = to.inputs;
  to.facts = known.of(text);
  const Facts& f = to.facts;
  Call& call = to.call;
  require(f.weights <= kWeights && f.matrices + f.vectors <= kExtras, "the kernel ", text, " reads too many tensors");
  const size_t wanted = 1 + (f.token_scales != 0) + size_t(f.weights) * (f.parts + f.bias) + f.matrices + f.vectors;
  require(inputs.size() == wanted, "the kernel ", text, " takes ", wanted, " tensors, not ", inputs.size());
  for (auto& one : inputs)
    if (!one.is_contiguous()) one = torch::stable::contiguous(one);
  const Tensor& x = inputs[0];
  require(x.dim() > 0 && x.size(-1) == f.k, "the kernel ", text, " takes x [.., ", f.k, "]");
  const auto kind = x.scalar_type();
  const ScalarType kinds[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  require(kind == (f.codes ? ScalarType::Byte : kinds[f.x]), "the kernel ", text,
                  " does not take x in this dtype");
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(f.n);
  to.y = fresh(shape, f.out);
  call.m = x.numel() / f.k;
  if (call.m == 0) return to;
  call.n = f.n, call.k = f.k, call.padded = f.padded;
  call.stride = f.stride, call.scale_row = f.scale_row, call.scale_group = f.scale_group, call.groups = f.groups;
  call.scale_count = f.scale_count;

  if (beside != nullptr && wants_alike(f, beside->facts)) {
    given_as(call, beside->call), to.turn = beside->turn;
  } else {
    to.turn = made_ready(call, f, x.const_data_ptr(), scratch);
  }
  size_t next = 1;
  if (f.token_scales != 0) {
    const Tensor& scales = inputs[next++];
    const int64_t count = f.token_scales == 1 ? 1 : call.m * (f.token_scales - 1);
    require(scales.numel() == count && scales.scalar_type() == ScalarType::Float, "the kernel ", text,
                    " takes ", count, " scales of x in float32");
    call.x_scales = static_cast<const float*>(scales.const_data_ptr());
    if (f.token_scales == 1) {
      scratch.scales.assign(call.m, call.x_scales[0]);
      call.x_scales = scratch.scales.data();
    }
  }
  for (int w = 0; w < f.weights; ++w) {
    const auto part = [&](int at) { return at < 0 ? nullptr : inputs[next + at].const_data_ptr(); };
    const auto right = [&](int at, int64_t type) {
      if (at < 0) return true;
      const Tensor& one = inputs[next + at];
      return one.numel() == f.scale_count && (type < 0 ? one.element_size() == 1 : one.scalar_type() == kinds[type]);
    };
    require(right(f.scales, f.scale_type) && right(f.zeros, f.zero_type), "the kernel ", text, " reads ",
                    f.scale_count, " scales, in the dtype that its format stores");
    require(f.level < 0 || inputs[next + f.level].scalar_type() == ScalarType::Float, "the kernel ", text,
                    " reads one scale of all scales in float32");
    require(inputs[next].numel() == f.n * f.stride && inputs[next].element_size() == 1, "the kernel ", text,
                    " reads ", f.n, " rows of ", f.stride, " bytes of codes");
    call.weights[w].codes = static_cast<const uint8_t*>(part(0));
    pages.holds(call.weights[w].codes, f.n * f.stride);
    call.weights[w].scales = part(f.scales);
    call.weights[w].zeros = part(f.zeros);
    call.weights[w].level = static_cast<const float*>(part(f.level));
    next += f.parts;
  }
  for (int w = 0; w < f.weights * f.bias; ++w) {
    require(inputs[next].numel() == f.n && inputs[next].scalar_type() == kinds[f.x], "the kernel ", text,
                    " reads a bias of ", f.n, " numbers in x's dtype");
    call.weights[w].bias = inputs[next++].const_data_ptr();
  }
  for (int i = 0; i < f.matrices + f.vectors; ++i) {
    const int64_t count = i < f.matrices ? call.m * f.n : f.n;
    require(inputs[next].numel() == count && inputs[next].scalar_type() == kinds[f.x], "the kernel ", text,
                    " reads ", count, " numbers beside its sums, in the result's dtype");
    call.extras[i] = inputs[next++].const_data_ptr();
  }
  call.y = to.y.mutable_data_ptr();
  return to;
}

// Tiles are so fast that x must come from a core's own cache, so a task has no more rows of it than lie there: each block
// of rows meets all of the weight. What that costs, to decode the weight so many times, is less than x from afar.
int64_t rows_of_x(const Prepared& one, int64_t tasks) {
  const Wants& wants = *one.facts.wants();
  const int64_t m = one.call.m;
  if (!wants.tiles) return m;
  constexpr int64_t cached = 1 << 20, least = 64;
  const int64_t row = one.call.padded * (one.facts.codes ? 1 : one.call.digits != nullptr ? 3 : 4);
  int64_t rows = std::max(least, cached / row);
  if (tasks < torch::stable::get_num_threads()) rows = std::min(rows, std::max(least, m / 2));
  const int64_t blocks = (m + rows - 1) / rows, unit = wants.width;
  return ((m + blocks - 1) / blocks + unit - 1) / unit * unit;
}

// Panels of x that have digits, and those that have none, a stretch of either at a time.
void in_digits_or_not(const Prepared& one, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const int64_t width = one.facts.wants()->width;
  Call as_numbers = one.call;
  as_numbers.digits = nullptr;
  while (begin < end) {
    const uint8_t* const refused = one.call.refused;
    int64_t to = begin + width;
    while (to < end && refused[to / width] == refused[begin / width]) to += width;
    one.facts.many(refused[begin / width] ? &as_numbers : &one.call, first, last, begin, std::min(to, end));
    begin = to;
  }
}

void run_turned(const Prepared& one) {
  const int64_t each = one.facts.wants()->rows, n = one.facts.n, m = one.call.m;
  const int64_t across = (n + each - 1) / each, rows = rows_of_x(one, across), down = (m + rows - 1) / rows;
  torch::stable::parallel_for(0, across * down, 1, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t block = first / across, from = first % across, to = std::min(across, from + last - first);
      const int64_t begin = block * rows, end = std::min(m, begin + rows);
      if (one.call.refused == nullptr)
        one.facts.many(&one.call, each * from, std::min(each * to, n), begin, end);
      else
        in_digits_or_not(one, each * from, std::min(each * to, n), begin, end);
      first += to - from;
    }
  });
}

// Products one behind the other, as one piece of work for all threads: starting them is worth some microseconds.
void run(const Prepared* all, int count) {
  int64_t tasks = 0, codes = 0, ends[kWeights];
  for (int i = 0; i < count; ++i) {
    const bool none = all[i].turn || all[i].call.m == 0;
    if (all[i].turn) run_turned(all[i]);
    const Facts& f = all[i].facts;
    tasks += none ? 0 : (f.n + 3) / 4;
    codes = std::max(codes, 4 * f.k * f.weights);
    ends[i] = tasks;
  }
  if (tasks == 0) return;
  // A thread is worth starting for some thirty thousand codes; a task takes four rows at a time.
  const int64_t least = 1 + (1 << 15) / (codes + 1);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (tasks + least - 1) / least);
  shared_out(tasks, threads, [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (int i = 0; i < count; start = ends[i++]) {
      const int64_t from = std::max(first, start) - start, to = std::min(last, ends[i]) - start;
      if (from < to) all[i].facts.run(&all[i].call, 4 * from, std::min(4 * to, all[i].facts.n));
    }
  });
}

std::vector<Tensor> fused(std::vector<Tensor> inputs, std::string text) {
  thread_local Scratch scratch;
  const Prepared one = prepared(std::move(inputs), text, nullptr, scratch);
  run(&one, 1);
  return {one.y};
}

// Several products of one x. texts: theirs, with kBeside between; inputs: the first one's, then what the others have but
// for x.
constexpr char kBeside[] = " & ";
std::vector<Tensor> beside(std::vector<Tensor> inputs, std::string texts) {
  thread_local Scratch scratch[kWeights];
  std::vector<Prepared> all;
  size_t next = 0;
  size_t more = 0;  // where the next text begins
  while (more != std::string::npos && all.size() < kWeights) {
    const size_t end = texts.find(kBeside, more);
    const std::string text = texts.substr(more, end == std::string::npos ? end : end - more);
    more = end == std::string::npos ? end : end + sizeof kBeside - 1;
    const Facts f = known.of(text);
    const size_t shared = 1 + (f.token_scales != 0);
    const size_t own = size_t(f.weights) * (f.parts + f.bias) + f.matrices + f.vectors;
    require(inputs.size() >= std::max(next, shared) + own, "there are too few tensors for ", texts);
    next = std::max(next, shared);
    std::vector<Tensor> given(inputs.begin(), inputs.begin() + shared);
    given.insert(given.end(), inputs.begin() + next, inputs.begin() + next + own);
    next += own;
    all.push_back(prepared(std::move(given), text, all.empty() ? nullptr : all.data(), scratch[all.size()]));
  }
  require(more == std::string::npos, "at most ", kWeights, " products are one call, not more: ", texts);
  require(next == inputs.size(), texts, " take ", next, " tensors, not ", inputs.size());
  run(all.data(), int(all.size()));
  std::vector<Tensor> found;
  for (const Prepared& one : all) found.push_back(one.y);
  return found;
}

}  // namespace
}  // namespace bitfold

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  m.impl("fused", TORCH_BOX(&bitfold::fused));
  m.impl("fused_beside", TORCH_BOX(&bitfold::beside));
}

// The same for C++ that Inductor writes; its tensors stay its own.
extern "C" AOTITorchError aoti_torch_cpu_fused(const AtenTensorHandle* inputs, int64_t count, const char* text,
                                               AtenTensorHandle* y) {
  return bitfold::called(inputs, count, &y, 1, [&](auto given) { return bitfold::fused(std::move(given), text); });
}

// Behind the texts a place for each result.
extern "C" AOTITorchError aoti_torch_cpu_fused_beside(const AtenTensorHandle* inputs, int64_t count, const char* texts,
                                                      ...) {
  AtenTensorHandle* y[bitfold::kWeights];
  size_t results = 1;
  for (const char* at = texts; (at = std::strstr(at, bitfold::kBeside)) != nullptr; ++at) ++results;
  bitfold::require(results <= bitfold::kWeights, "at most ", bitfold::kWeights, " products are one call, not more: ", texts);
  va_list places;
  va_start(places, texts);
  for (size_t i = 0; i < results; ++i) y[i] = va_arg(places, AtenTensorHandle*);
  va_end(places);
  return bitfold::called(inputs, count, y, results, [&](auto given) { return bitfold::beside(std::move(given), texts); });
}

BITFOLD_KNOWN(runtime, bitfold::Facts)
