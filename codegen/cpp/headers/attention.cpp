// The operators of attention on CPU tensors, in a few queries: `bitfold::few_queries` over keys and values of
// floats, in any strides of the first three dimensions, and `bitfold::attend_few` over a cache in codes, by
// kernels found by their text. Heads of queries that share keys are taken together, so that a cache is read
// once and never repeated; what no query sees at its end is not read.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "kernel.h"
#include VECTORS
#include "numbers.h"
#include "attention.h"
#include "called.h"
#include "known.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace bitfold {

using Attend = void (*)(const Attention*, int64_t, int64_t);

// What an `AttentionSpec` says, in numbers; `codegen/cpp/attention_build.py` fills one in.
struct AttentionFacts {
  Attend run;
  int64_t heads, kv_heads, dim, page;
  int32_t parts, x, mask;  // x: 0 float32, 1 bfloat16, 2 float16; mask: 0 none, 1 bools, 2 numbers
  float scale;
  // Of each part: sizes [entries or pages, heads, .., ..], and its type as x's, -1 for a byte.
  int64_t sizes[kCacheParts][4], types[kCacheParts];
};
constexpr int64_t kEntries = -1, kLength = -2;  // sizes that a call has: of the first part, of which others have as many

namespace {

// Numbers of keys that are worth a thread.
constexpr int64_t kWorth = 1 << 14;
constexpr ScalarType kKinds[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

Known<AttentionFacts> known;

Four four(const Tensor& t) {
  Four found;
  found.data = static_cast<const char*>(t.const_data_ptr());
  for (int i = 0; i < 4; ++i) found.size[i] = t.size(i), found.stride[i] = t.size(i) == 1 ? 0 : t.stride(i);
  return found;
}

Table table(const Tensor& t, const char* name) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  require(t.dim() == 2 && (wide || t.scalar_type() == ScalarType::Int), name, " are integers of two dimensions");
  return {t.const_data_ptr(), wide, {t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1)}};
}

// The mask spread over queries and tokens, whose number is known by then.
void masked(Queries& call, const std::optional<Tensor>& mask, ScalarType kind) {
  if (!mask.has_value()) return;
  const int64_t wanted[] = {call.q.size[0], call.q.size[1], call.q.size[2]};
  require(mask->dim() == 4 && mask->size(3) == call.tokens, "a mask has a number for each of ", call.tokens,
                  " tokens");
  for (int i = 0; i < 3; ++i)
    require(mask->size(i) == 1 || mask->size(i) == wanted[i], "a mask spreads over [B, H, T, S]");
  call.bools = mask->scalar_type() == ScalarType::Bool;
  require(call.bools || mask->scalar_type() == kind, "a mask is of bools, or of q's dtype");
  call.mask = four(*mask);
}

Tensor fresh(const Tensor& q) {
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3);
  const int64_t shape[] = {b, h, t, d}, strides[] = {t * h * d, d, h * d, 1};
  const ScalarType kind = q.scalar_type();
  const int32_t code = kind == ScalarType::Float ? aoti_torch_dtype_float32()
                       : kind == ScalarType::Half ? aoti_torch_dtype_float16()
                                                  : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  require(aoti_torch_empty_strided(4, shape, strides, code, aoti_torch_device_type_cpu(), 0, &handle) ==
                      AOTI_TORCH_SUCCESS,
                  "no memory for the result");
  return Tensor(handle);
}

int64_t grain(const Queries& call) { return std::max<int64_t>(1, kWorth / (call.tokens * call.dim() + 1)); }

Tensor few_queries(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, double scale) {
  const ScalarType kind = q.scalar_type();
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "few_queries takes q, k and v of four dimensions");
  require(kind == ScalarType::Float || kind == ScalarType::BFloat16 || kind == ScalarType::Half,
                  "few_queries takes float32, bfloat16 and float16");
  require(k.scalar_type() == kind && v.scalar_type() == kind, "q, k and v are of one dtype");
  for (int i = 0; i < 4; ++i) require(k.size(i) == v.size(i), "k and v are of one shape");
  require(q.size(0) == k.size(0) && q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                  "heads of q share those of k evenly");
  require(q.size(3) % 16 == 0, "a head has a multiple of 16 numbers, not ", q.size(3));
  for (Tensor* t : {&q, &k, &v})
    if (t->stride(3) != 1) *t = torch::stable::contiguous(*t);
  Queries call;
  call.q = four(q), call.tokens = k.size(2), call.kv_heads = k.size(1), call.scale = static_cast<float>(scale);
  masked(call, mask, kind);
  const Tensor y = fresh(q);
  call.y = y.mutable_data_ptr();
  const int64_t dim = q.size(3);
  torch::stable::parallel_for(0, q.size(0) * k.size(1), grain(call), [&](int64_t first, int64_t last) {
    const auto run = [&](auto type) {
      using T = decltype(type);
      attend<T>(call, Numbers<T>{four(k), dim}, Numbers<T>{four(v), dim}, first, last);
    };
    if (kind == ScalarType::Float) run(f32{});
    if (kind == ScalarType::BFloat16) run(bf16{});
    if (kind == ScalarType::Half) run(f16{});
  });
  return y;
}

// Parts as the kernel reads them: nothing of them is looked at again.
void parts(Cache& to, const std::vector<Tensor>& cache, const AttentionFacts& f, const std::string& text) {
  require(cache.size() == size_t(f.parts), text, " takes a cache of ", f.parts, " tensors");
  for (size_t i = 0; i < cache.size(); ++i) {
    const Tensor& one = cache[i];
    require(one.is_contiguous() && one.dim() == 4, "parts of a cache are contiguous");
    bool right = f.types[i] < 0 ? one.element_size() == 1 : one.scalar_type() == kKinds[f.types[i]];
    for (int d = 0; d < 4; ++d) {
      const int64_t size = f.sizes[i][d];
      right = right && one.size(d) == (size == kEntries ? cache[0].size(0) : size == kLength ? cache[0].size(2) : size);
    }
    require(right, "part ", i, " of the cache has not the sizes and the dtype that ", text, " says, beside part 0");
    to.parts[i] = one.const_data_ptr();
    // Codes are read two bytes at a time.
    require(reinterpret_cast<uintptr_t>(to.parts[i]) % 2 == 0 || f.sizes[i][3] == 1, "part ", i,
                    " of the cache begins at an odd address; give a copy");
  }
  to.length = cache[0].size(2), to.page = f.page;
}

// Pages that a query may look into are there.
void check_pages(const Queries& call, const Cache& cache, int64_t entries, int64_t pages) {
  for (int64_t b = 0; b < entries; ++b)
    for (int64_t i = 0, end = end_of(call, b); i * cache.page < end; ++i) {
      const int64_t page = cache.pages.get(b, i);
      require(page >= 0 && page < pages, "there is no page ", page, " in a cache of ", pages);
    }
}

Tensor attend_few(Tensor q, std::vector<Tensor> cache, Tensor limits, std::optional<Tensor> mask,
                  std::optional<Tensor> pages, std::string text) {
  const AttentionFacts f = known.of(text);
  require(q.dim() == 4 && q.size(1) == f.heads && q.size(3) == f.dim && q.scalar_type() == kKinds[f.x], text,
                  " takes q [B, ", f.heads, ", T, ", f.dim, "] in its dtype");
  require(mask.has_value() == (f.mask != 0) && pages.has_value() == (f.page != 0), text,
                  " says whether there are a mask and a table of pages");
  if (q.stride(3) != 1) q = torch::stable::contiguous(q);
  Attention all;
  parts(all.cache, cache, f, text);
  Queries& call = all.queries;
  call.q = four(q), call.kv_heads = f.kv_heads, call.scale = f.scale, call.tokens = all.cache.length;
  if (pages.has_value()) {
    all.cache.pages = table(*pages, "pages");
    require(pages->size(0) == 1 || pages->size(0) == q.size(0), "pages spread over [B, n]");
    call.tokens = pages->size(1) * f.page;
  } else {
    require(cache[0].size(0) == q.size(0), "the cache has ", cache[0].size(0), " entries and the call ",
                    q.size(0));
  }
  call.limits = table(limits, "limits");
  for (int i = 0; i < 2; ++i)
    require(limits.size(i) == 1 || limits.size(i) == q.size(2 * i), "limits spread over [B, T]");
  masked(call, mask, q.scalar_type());
  if (f.page != 0) check_pages(call, all.cache, q.size(0), cache[0].size(0));
  const Tensor y = fresh(q);
  call.y = y.mutable_data_ptr();
  torch::stable::parallel_for(0, q.size(0) * f.kv_heads, grain(call),
                              [&](int64_t first, int64_t last) { f.run(&all, first, last); });
  return y;
}

std::optional<Tensor> maybe(const AtenTensorHandle* given) {
  return given == nullptr ? std::nullopt : std::optional<Tensor>(again(*given));
}

}  // namespace
}  // namespace bitfold

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) {
  m.impl("few_queries", TORCH_BOX(&bitfold::few_queries));
  m.impl("attend_few", TORCH_BOX(&bitfold::attend_few));
}

// The same for C++ that Inductor writes: no dispatcher in between. Its tensors stay its own.
extern "C" AOTITorchError aoti_torch_cpu_few_queries(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                     AtenTensorHandle* mask, double scale, AtenTensorHandle* y) {
  using namespace bitfold;
  hand_out(few_queries(again(q), again(k), again(v), maybe(mask), scale), y);
  return AOTI_TORCH_SUCCESS;
}
extern "C" AOTITorchError aoti_torch_cpu_attend_few(AtenTensorHandle q, const AtenTensorHandle* cache, int64_t count,
                                                    AtenTensorHandle limits, AtenTensorHandle* mask,
                                                    AtenTensorHandle* pages, const char* text, AtenTensorHandle* y) {
  using namespace bitfold;
  std::vector<Tensor> parts;
  for (int64_t i = 0; i < count; ++i) parts.push_back(again(cache[i]));
  hand_out(attend_few(again(q), std::move(parts), again(limits), maybe(mask), maybe(pages), text), y);
  return AOTI_TORCH_SUCCESS;
}

BITFOLD_KNOWN(attention, bitfold::AttentionFacts)
