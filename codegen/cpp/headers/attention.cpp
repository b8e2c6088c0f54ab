// The operator `bitfold::few_queries` on CPU tensors: attention of a few queries over keys and values as they
// lie, [B, Hkv, S, D] in any strides of the first three dimensions. Heads of queries that share keys are taken
// together, so that a cache is read once and never repeated; what no query sees at its end is not read.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <optional>
#include <vector>

#include "kernel.h"
#include VECTORS
#include "numbers.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace bitfold {
namespace {

// Numbers of keys that are worth a thread.
constexpr int64_t kWorth = 1 << 14;
// Queries whose sums are in registers together.
constexpr int kRows = 4;

// A tensor of four dimensions: where it is, and how far apart neighbours are.
struct Four {
  const char* data = nullptr;
  int64_t size[4] = {}, stride[4] = {};
  explicit Four(const Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())) {
    for (int i = 0; i < 4; ++i) size[i] = t.size(i), stride[i] = t.size(i) == 1 ? 0 : t.stride(i);
  }
  Four() = default;
  int64_t at(int64_t a, int64_t b, int64_t c) const { return a * stride[0] + b * stride[1] + c * stride[2]; }
};

// What a call has: rows of queries that share keys are numbered head by head, query by query.
struct Queries {
  Four q, k, v, mask;
  bool bools = false;  // the mask's type, else numbers of q's
  float scale = 1;
  void* y = nullptr;  // [B, T, H, D]
  int64_t heads() const { return q.size[1]; }
  int64_t queries() const { return q.size[2]; }
  int64_t dim() const { return q.size[3]; }
  int64_t tokens() const { return k.size[2]; }
  int64_t group() const { return heads() / k.size[1]; }
};

// exp of x <= 0, to a unit in the last place: 2**n times a polynomial of what is left of x.
inline float power(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// A row of numbers as floats: where it lies, or in `room`.
template <class T> inline const float* floats(const char* data, int64_t at, int64_t dim, float* room) {
  if constexpr (std::is_same_v<T, f32>) return reinterpret_cast<const float*>(data) + at;
  const void* from = data + 2 * at;
  for (int64_t d = 0; d < dim; ++d) room[d] = T::get(from, d);
  return room;
}

struct Room {
  std::vector<float> queries, scores, row, sums;
};

// One past the last token that any query of the entry may see: a mask of bools tells.
int64_t end_of(const Queries& call, int64_t entry) {
  if (!call.bools) return call.tokens();
  int64_t end = 0;
  for (int64_t h = 0; h < call.mask.size[1]; ++h)
    for (int64_t t = 0; t < call.mask.size[2]; ++t) {
      const char* shown = call.mask.data + call.mask.at(entry, h, t);
      int64_t s = call.tokens();
      while (s > end && !shown[(s - 1) * call.mask.stride[3]]) --s;
      end = s;
    }
  return end;
}

// Scores of R rows of queries, [R, S], for tokens 0 .. end - 1.
template <class T, int R>
void score(const Queries& call, int64_t entry, int64_t head, const float* q, int64_t end, float* scores, float* room) {
  const int64_t dim = call.dim(), tokens = call.tokens();
  for (int64_t s = 0; s < end; ++s) {
    const float* k = floats<T>(call.k.data, call.k.at(entry, head, s), dim, room);
    Floats sums[R];
    for (int r = 0; r < R; ++r) sums[r] = zeros();
    for (int64_t d = 0; d < dim; d += kFloats) {
      const Floats key = loadf(k + d);
      for (int r = 0; r < R; ++r) sums[r] = madd(key, loadf(q + r * dim + d), sums[r]);
    }
    for (int r = 0; r < R; ++r) scores[r * tokens + s] = sum(sums[r]);
  }
}

// Weights of a row in place of its scores; their sum.
template <class T> float weigh(const Queries& call, int64_t entry, int64_t head, int64_t query, int64_t end, float* row) {
  const char* mask = call.mask.data;
  constexpr float none = -std::numeric_limits<float>::infinity();
  if (mask != nullptr) {
    const int64_t at = call.mask.at(entry, head, query), step = call.mask.stride[3];
    if (call.bools)
      for (int64_t s = 0; s < end; ++s) row[s] = mask[at + s * step] ? row[s] : none;
    else
      for (int64_t s = 0; s < end; ++s) row[s] += T::get(mask, at + s * step);
  }
  float most = none;
  bool number = true;
  for (int64_t s = 0; s < end; ++s) most = std::max(most, row[s]), number &= row[s] == row[s];
  if (!number) {
    std::fill(row, row + end, std::numeric_limits<float>::quiet_NaN());
    return 1;
  }
  if (most == none) {  // it sees nothing
    std::fill(row, row + end, 0.0f);
    return 1;
  }
  float all = 0;
  for (int64_t s = 0; s < end; ++s) row[s] = row[s] == none ? 0.0f : power(row[s] - most);
  for (int64_t s = 0; s < end; ++s) all += row[s];
  return all;
}

// Sums of values times weights of R rows, [R, D].
template <class T, int R>
void mix(const Queries& call, int64_t entry, int64_t head, const float* weights, int64_t end, float* sums, float* room) {
  const int64_t dim = call.dim(), tokens = call.tokens();
  std::fill(sums, sums + R * dim, 0.0f);
  for (int64_t s = 0; s < end; ++s) {
    const float* v = floats<T>(call.v.data, call.v.at(entry, head, s), dim, room);
    for (int r = 0; r < R; ++r) {
      const Floats weight = same(weights[r * tokens + s]);
      float* to = sums + r * dim;
      for (int64_t d = 0; d < dim; d += kFloats) storef(to + d, madd(weight, loadf(v + d), loadf(to + d)));
    }
  }
}

template <class T, int R>
void rows(const Queries& call, int64_t entry, int64_t kv_head, int64_t first, int64_t end, Room& room) {
  const int64_t dim = call.dim(), queries = call.queries(), tokens = call.tokens();
  const int64_t head = kv_head * call.group();
  room.queries.resize(R * dim), room.sums.resize(R * dim), room.scores.resize(R * tokens), room.row.resize(dim);
  for (int r = 0; r < R; ++r) {
    const int64_t at = call.q.at(entry, head + (first + r) / queries, (first + r) % queries);
    const float* q = floats<T>(call.q.data, at, dim, room.row.data());
    for (int64_t d = 0; d < dim; ++d) room.queries[r * dim + d] = q[d] * call.scale;
  }
  score<T, R>(call, entry, kv_head, room.queries.data(), end, room.scores.data(), room.row.data());
  float all[R];
  for (int r = 0; r < R; ++r)
    all[r] = weigh<T>(call, entry, head + (first + r) / queries, (first + r) % queries, end,
                      room.scores.data() + r * tokens);
  mix<T, R>(call, entry, kv_head, room.scores.data(), end, room.sums.data(), room.row.data());
  for (int r = 0; r < R; ++r) {
    const int64_t h = head + (first + r) / queries, t = (first + r) % queries;
    const int64_t at = ((entry * queries + t) * call.heads() + h) * dim;
    for (int64_t d = 0; d < dim; ++d) T::put(call.y, at + d, room.sums[r * dim + d] / all[r]);
  }
}

// All queries that share one head of one entry's keys.
template <class T> void one(const Queries& call, int64_t entry, int64_t head) {
  thread_local Room room;
  const int64_t end = end_of(call, entry), many = call.group() * call.queries();
  int64_t first = 0;
  for (; first + kRows <= many; first += kRows) rows<T, kRows>(call, entry, head, first, end, room);
  if (many - first == 3) rows<T, 3>(call, entry, head, first, end, room);
  if (many - first == 2) rows<T, 2>(call, entry, head, first, end, room);
  if (many - first == 1) rows<T, 1>(call, entry, head, first, end, room);
}

Tensor fresh(const Tensor& q) {
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3);
  const int64_t shape[] = {b, h, t, d}, strides[] = {t * h * d, d, h * d, 1};
  const ScalarType kind = q.scalar_type();
  const int32_t code = kind == ScalarType::Float ? aoti_torch_dtype_float32()
                       : kind == ScalarType::Half ? aoti_torch_dtype_float16()
                                                  : aoti_torch_dtype_bfloat16();
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(4, shape, strides, code, aoti_torch_device_type_cpu(), 0, &handle) ==
                      AOTI_TORCH_SUCCESS,
                  "no memory for the result");
  return Tensor(handle);
}

Tensor few_queries(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, double scale) {
  const ScalarType kind = q.scalar_type();
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "few_queries takes q, k and v of four dimensions");
  STD_TORCH_CHECK(kind == ScalarType::Float || kind == ScalarType::BFloat16 || kind == ScalarType::Half,
                  "few_queries takes float32, bfloat16 and float16");
  STD_TORCH_CHECK(k.scalar_type() == kind && v.scalar_type() == kind, "q, k and v are of one dtype");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == v.size(i), "k and v are of one shape");
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                  "heads of q share those of k evenly");
  STD_TORCH_CHECK(q.size(3) % 16 == 0, "a head has a multiple of 16 numbers, not ", q.size(3));
  for (Tensor* t : {&q, &k, &v})
    if (t->stride(3) != 1) *t = torch::stable::contiguous(*t);
  Queries call{Four(q), Four(k), Four(v), Four(), false, static_cast<float>(scale)};
  if (mask.has_value()) {
    const int64_t wanted[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(3) == k.size(2), "a mask has a number for each of ", k.size(2),
                    " tokens");
    for (int i = 0; i < 3; ++i)
      STD_TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == wanted[i], "a mask spreads over [B, H, T, S]");
    call.bools = mask->scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(call.bools || mask->scalar_type() == kind, "a mask is of bools, or of q's dtype");
    call.mask = Four(*mask);
  }
  const Tensor y = fresh(q);
  call.y = y.mutable_data_ptr();
  const int64_t heads = k.size(1), each = std::max<int64_t>(1, kWorth / (call.tokens() * call.dim() + 1));
  torch::stable::parallel_for(0, q.size(0) * heads, each, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (kind == ScalarType::Float) one<f32>(call, i / heads, i % heads);
      if (kind == ScalarType::BFloat16) one<bf16>(call, i / heads, i % heads);
      if (kind == ScalarType::Half) one<f16>(call, i / heads, i % heads);
    }
  });
  return y;
}

Tensor again(AtenTensorHandle given) {
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_new_tensor_handle(given, &handle) == AOTI_TORCH_SUCCESS, "no handle of a tensor");
  return Tensor(handle);
}

}  // namespace
}  // namespace bitfold

STABLE_TORCH_LIBRARY_IMPL(bitfold, CPU, m) { m.impl("few_queries", TORCH_BOX(&bitfold::few_queries)); }

// The same for C++ that Inductor writes: no dispatcher in between. Its tensors stay its own.
extern "C" AOTITorchError aoti_torch_cpu_few_queries(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                     AtenTensorHandle* mask, double scale, AtenTensorHandle* y) {
  try {
    std::optional<Tensor> shown;
    if (mask != nullptr) shown = bitfold::again(*mask);
    const Tensor found = bitfold::few_queries(bitfold::again(q), bitfold::again(k), bitfold::again(v), shown, scale);
    return aoti_torch_new_tensor_handle(found.get(), y);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return AOTI_TORCH_FAILURE;
  }
}
