// Attention of a few queries: what the kernel over a cache of floats and those over codes share. A kind of keys
// or values is a class with `row(entry, head, token, room)`, a token's numbers as floats. Stands behind
// VECTORS and numbers.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "functions.h"

namespace bitfold {

// Queries whose sums are in registers together.
constexpr int kQueries = 4;
// Tokens whose values are added to them together.
constexpr int kTokens = 8;
// Parts of a cache: codes, scales and zero points, of keys and of values.
constexpr int kCacheParts = 6;

// A tensor of four dimensions: where it is, and how far apart neighbours are.
struct Four {
  const char* data = nullptr;
  int64_t size[4] = {}, stride[4] = {};
  int64_t at(int64_t a, int64_t b, int64_t c) const { return a * stride[0] + b * stride[1] + c * stride[2]; }
};

// Integers [B, n]: limits, or a table of pages.
struct Table {
  const void* data = nullptr;
  bool wide = false;  // 64 bits
  int64_t stride[2] = {};
  int64_t get(int64_t a, int64_t b) const {
    const int64_t at = a * stride[0] + b * stride[1];
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

// What a call has: rows of queries that share keys are numbered head by head, query by query.
struct Queries {
  Four q, mask;
  bool bools = false;  // the mask's type, else numbers of q's
  Table limits;        // how many tokens each query sees; none: all
  int64_t tokens = 0, kv_heads = 1;
  float scale = 1;
  void* y = nullptr;  // [B, T, H, D]
  int64_t heads() const { return q.size[1]; }
  int64_t queries() const { return q.size[2]; }
  int64_t dim() const { return q.size[3]; }
  int64_t group() const { return heads() / kv_heads; }
  int64_t limit(int64_t entry, int64_t query) const {
    return limits.data ? std::min(std::max<int64_t>(limits.get(entry, query), 0), tokens) : tokens;
  }
};

// A cache in codes: parts in order, and which page holds an entry's tokens, if there are pages.
struct Cache {
  const void* parts[kCacheParts] = {};
  Table pages;
  int64_t length = 0, page = 0;  // tokens of an entry, or of a page, in memory; of a page, or 0
};

// One call of a generated kernel.
struct Attention {
  Queries queries;
  Cache cache;
};

// A row of numbers as floats: where it lies, or in `room`.
template <class T> inline const float* floats(const char* data, int64_t at, int64_t dim, float* room) {
  if constexpr (std::is_same_v<T, f32>) return reinterpret_cast<const float*>(data) + at;
  const void* from = data + 2 * at;
  for (int64_t d = 0; d < dim; ++d) room[d] = T::get(from, d);
  return room;
}

// Keys or values that lie as floats.
template <class T> struct Numbers {
  Four at;
  int64_t dim;
  const float* row(int64_t entry, int64_t head, int64_t token, float* room) const {
    return floats<T>(at.data, at.at(entry, head, token), dim, room);
  }
};

struct Room {
  std::vector<float> queries, scores, row, sums;
};

// One past the last token that any query of the entry may see: limits and a mask of bools tell.
inline int64_t end_of(const Queries& call, int64_t entry) {
  int64_t most = 0, end = 0;
  for (int64_t t = 0; t < call.queries(); ++t) most = std::max(most, call.limit(entry, t));
  if (!call.bools) return most;
  for (int64_t h = 0; h < call.mask.size[1]; ++h)
    for (int64_t t = 0; t < call.mask.size[2]; ++t) {
      const char* shown = call.mask.data + call.mask.at(entry, h, t);
      int64_t s = most;
      while (s > end && !shown[(s - 1) * call.mask.stride[3]]) --s;
      end = s;
    }
  return end;
}

// Scores of R rows of queries, [R, S], for tokens 0 .. end - 1.
template <int R, class Keys>
void score(const Queries& call, const Keys& keys, int64_t entry, int64_t head, int64_t end, Room& room) {
  const int64_t dim = call.dim(), tokens = call.tokens;
  const float* q = room.queries.data();
  float* scores = room.scores.data();
  for (int64_t s = 0; s < end; ++s) {
    const float* k = keys.row(entry, head, s, room.row.data());
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
template <class T>
float weigh(const Queries& call, int64_t entry, int64_t head, int64_t query, int64_t end, float* row) {
  const char* mask = call.mask.data;
  constexpr float none = -std::numeric_limits<float>::infinity();
  if (mask != nullptr) {
    const int64_t at = call.mask.at(entry, head, query), step = call.mask.stride[3];
    if (call.bools)
      for (int64_t s = 0; s < end; ++s) row[s] = mask[at + s * step] ? row[s] : none;
    else
      for (int64_t s = 0; s < end; ++s) row[s] += T::get(mask, at + s * step);
  }
  std::fill(row + std::min(call.limit(entry, query), end), row + end, none);
  // In lanes, as a vector adds: one after the other, sums of a long row take longer than its keys.
  constexpr int kLanes = 16;
  float most[kLanes], all[kLanes] = {};
  int wrong[kLanes] = {};
  std::fill(most, most + kLanes, none);
  const int64_t whole = end / kLanes * kLanes;
  const auto look = [&](int64_t s, int i) {
    most[i] = row[s] > most[i] ? row[s] : most[i];
    wrong[i] |= row[s] != row[s];
  };
  for (int64_t s = 0; s < whole; s += kLanes)
    for (int i = 0; i < kLanes; ++i) look(s + i, i);
  for (int64_t s = whole; s < end; ++s) look(s, 0);
  for (int i = 1; i < kLanes; ++i) most[0] = std::max(most[0], most[i]), wrong[0] |= wrong[i];
  if (wrong[0]) {
    std::fill(row, row + end, std::numeric_limits<float>::quiet_NaN());
    return 1;
  }
  if (most[0] == none) {  // it sees nothing
    std::fill(row, row + end, 0.0f);
    return 1;
  }
  const float top = most[0];
  const auto raise = [&](int64_t s, int i) {
    row[s] = row[s] == none ? 0.0f : exponential(row[s] - top);
    all[i] += row[s];
  };
  for (int64_t s = 0; s < whole; s += kLanes)
    for (int i = 0; i < kLanes; ++i) raise(s + i, i);
  for (int64_t s = whole; s < end; ++s) raise(s, 0);
  for (int i = 1; i < kLanes; ++i) all[0] += all[i];
  return all[0];
}

// Sums of values times weights of R rows, [R, D]: so many tokens at a time that sums are in memory seldom.
template <int R, int many, class Values>
void mix(const Queries& call, const Values& values, int64_t entry, int64_t head, int64_t s, Room& room) {
  const int64_t dim = call.dim(), tokens = call.tokens;
  const float* v[many];
  for (int j = 0; j < many; ++j) v[j] = values.row(entry, head, s + j, room.row.data() + 2 * dim * j);
  for (int r = 0; r < R; ++r) {
    Floats weight[many];
    for (int j = 0; j < many; ++j) weight[j] = same(room.scores[r * tokens + s + j]);
    float* to = room.sums.data() + r * dim;
    for (int64_t d = 0; d < dim; d += kFloats) {
      Floats sum = loadf(to + d);
      for (int j = 0; j < many; ++j) sum = madd(weight[j], loadf(v[j] + d), sum);
      storef(to + d, sum);
    }
  }
}

template <class T, int R, class Keys, class Values>
void rows(const Queries& call, const Keys& keys, const Values& values, int64_t entry, int64_t kv_head, int64_t first,
          int64_t end, Room& room) {
  const int64_t dim = call.dim(), queries = call.queries(), tokens = call.tokens;
  const int64_t head = kv_head * call.group();
  // A row of codes may end in padding: less than half of it.
  room.queries.resize(R * dim), room.sums.resize(R * dim), room.scores.resize(R * tokens);
  room.row.resize(2 * dim * kTokens);
  for (int r = 0; r < R; ++r) {
    const int64_t at = call.q.at(entry, head + (first + r) / queries, (first + r) % queries);
    const float* q = floats<T>(call.q.data, at, dim, room.row.data());
    for (int64_t d = 0; d < dim; ++d) room.queries[r * dim + d] = q[d] * call.scale;
  }
  score<R>(call, keys, entry, kv_head, end, room);
  float all[R];
  for (int r = 0; r < R; ++r)
    all[r] = weigh<T>(call, entry, head + (first + r) / queries, (first + r) % queries, end,
                      room.scores.data() + r * tokens);
  std::fill(room.sums.begin(), room.sums.begin() + R * dim, 0.0f);
  int64_t s = 0;
  for (; s + kTokens <= end; s += kTokens) mix<R, kTokens>(call, values, entry, kv_head, s, room);
  for (; s < end; ++s) mix<R, 1>(call, values, entry, kv_head, s, room);
  for (int r = 0; r < R; ++r) {
    const int64_t h = head + (first + r) / queries, t = (first + r) % queries;
    const int64_t at = ((entry * queries + t) * call.heads() + h) * dim;
    for (int64_t d = 0; d < dim; ++d) T::put(call.y, at + d, room.sums[r * dim + d] / all[r]);
  }
}

// All queries that share heads first .. last - 1, numbered entry by entry.
template <class T, class Keys, class Values>
void attend(const Queries& call, const Keys& keys, const Values& values, int64_t first, int64_t last) {
  thread_local Room room;
  for (int64_t i = first; i < last; ++i) {
    const int64_t entry = i / call.kv_heads, head = i % call.kv_heads;
    const int64_t end = end_of(call, entry), many = call.group() * call.queries();
    int64_t at = 0;
    for (; at + kQueries <= many; at += kQueries) rows<T, kQueries>(call, keys, values, entry, head, at, end, room);
    if (many - at == 3) rows<T, 3>(call, keys, values, entry, head, at, end, room);
    if (many - at == 2) rows<T, 2>(call, keys, values, entry, head, at, end, room);
    if (many - at == 1) rows<T, 1>(call, keys, values, entry, head, at, end, room);
  }
}

}  // namespace bitfold
