// Products with many rows of x: decoded rows of the weight times panels of x, in registers.
//
// A panel is x turned: a vector holds the same number of neighbouring rows, so that each number of the weight is
// broadcast and multiplies whole vectors, and no sum goes across one. kTile rows of the weight and two vectors keep
// all sums in registers. Stands behind VECTORS.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace bitfold {

constexpr int kPanel = 2 * kFloats;   // rows of x side by side, as floats
constexpr int kIntPanel = 2 * kInts;  // and as integers

}  // namespace bitfold

#if defined(BITFOLD_TILES)
#include "tiles.h"
#endif

namespace bitfold {

#if !defined(BITFOLD_TILES)
constexpr int kHalf = kInts;   // rows of x, of the two times so many that `multiply` takes
constexpr int kStored = 24;    // rows of the weight that are decoded at a time
constexpr int kApart = 16;     // numbers between decoded rows, so that these do not meet in the cache
constexpr int kDeepest = 256;  // codes of a row that are decoded at a time: sixteen rows of x take 16 KiB
constexpr bool kTiled = false;

template <bool> struct Multiplier {
  explicit Multiplier(int) {}
};

// What sums of integers are scaled in; rows of x whose sums are taken out of the way that they lie in at a time.
constexpr int kWide = kInts, kEnds = 1;
using WideInts = Ints;
using WideSums = Sums;
inline WideSums wide_sums(const float* p) { return load_sums(p); }
inline void store_wide(float* p, WideSums v) { store_sums(p, v); }
#endif
static_assert(kStored % kTile == 0 && kStored % kIntTile == 0);

// Numbers from a line of the cache on.
template <class T> class Lines {
 public:
  explicit Lines(int64_t count) : all_(count + kLine / sizeof(T)) {}
  T* begin() {
    const auto at = reinterpret_cast<uintptr_t>(all_.data());
    return reinterpret_cast<T*>((at + kLine - 1) / kLine * kLine);
  }

 private:
  std::vector<T> all_;
};

constexpr int kLeast = 9;  // rows of x: fewer are four at a time, each a row of memory

// What the runtime is told of these; held: whether codes leave registers in the order of `place`.
// bits: of codes that are multiplied as integers, 0 for floats; many, step: numbers of many rows of x to a block of
// digits and to a tile of it, 0 for none; lanes, joined: as `Wants` has them. `static`, since statics of an inline
// function are one for the whole process: a library for other vectors would be told what the first one wants.
template <bool held, int bits, int digits, int base, bool words, int many, int step, int lanes, int joined>
static const Wants* wants() {
  static constexpr auto order = [] {
    struct {
      int8_t at[32];
    } found{};
    for (int i = 0; i < 32; ++i) found.at[i] = static_cast<int8_t>(place(i));
    return found;
  }();
  constexpr bool moved = held && place(1) != 1;
  static constexpr Wants of_floats = {moved ? order.at : nullptr, kPanel, 1, 4, kLeast, kStored, digits, base, words,
                                      kTiled, kTiled ? many : 0, step, lanes, joined};
  static constexpr Wants of_codes = {nullptr, kIntPanel, Deep<bits>::depth, int(sizeof(typename Deep<bits>::Number)),
                                     kLeast, kStored, 0, 0, 0, kTiled, 0, 0, lanes, 0};
  return bits == 0 ? &of_floats : &of_codes;
}

// A vector of bytes, four of each of eight groups, each four to its own group, which are `apart` numbers apart.
template <class Code> inline void put_apart(Code* to, int64_t apart, Bytes v) {
  uint8_t all[32];
  store(all, v);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) to[lane * apart + i] = all[4 * lane + i];
}

// sums[r][v] += w[r][k] * x[k][v] for k < count; a row of the weight is `stride` numbers, of sums `across`. Not inlined:
// inside of `many` GCC 12 writes the sums of one vector to the stack behind every product.
template <int V>
[[gnu::noinline]] void multiply(const float* w, int64_t stride, const float* x, int64_t count, float* sums, int64_t across) {
  Floats s[kTile][V];
  for (int r = 0; r < kTile; ++r)
    for (int v = 0; v < V; ++v) s[r][v] = loadf(sums + r * across + v * kFloats);
  for (int64_t k = 0; k < count; ++k) {
    Floats b[V];
    for (int v = 0; v < V; ++v) b[v] = loadf(x + k * kPanel + v * kFloats);
    for (int r = 0; r < kTile; ++r) {
      const Floats a = same(w[r * stride + k]);
      for (int v = 0; v < V; ++v) s[r][v] = madd(a, b[v], s[r][v]);
    }
  }
  for (int r = 0; r < kTile; ++r)
    for (int v = 0; v < V; ++v) storef(sums + r * across + v * kFloats, s[r][v]);
}

// Sums of kStored rows of each weight, `across` apart, for kEnds rows of x, as their end takes them.
template <int many> inline void taken_out(const float* sums, int64_t across, float (*to)[many][kStored][1]) {
  for (int i = 0; i < many; ++i) {
    const float* of = sums + i * kStored * across;
#if defined(BITFOLD_TILES)
    for (int r = 0; r < kStored; r += kEnds)
      transposed(of + r * across, across * int64_t(sizeof(float)), &to[0][i][r][0], sizeof to[0]);
#else
    for (int r = 0; r < kStored; ++r) to[0][i][r][0] = of[r * across];
#endif
  }
}

#if !defined(BITFOLD_TILES)
// The same of integers, exactly, D::depth at a time; `use(r, v, s)` has the sums of each. Not inlined: inside of `many`
// the compiler writes all sums to the stack behind every product.
template <class D, int V, int, class Use>
[[gnu::noinline]] void multiply(Multiplier<false>&, const typename D::Code* w, int64_t stride,
                                const typename D::Number* x, int64_t, int64_t count, Use&& use) {
  Ints s[kIntTile][V];
  for (int r = 0; r < kIntTile; ++r)
    for (int v = 0; v < V; ++v) s[r][v] = no_ints();
  for (int64_t k = 0; k < count; k += D::depth) {
    Ints b[V];
    for (int v = 0; v < V; ++v) b[v] = numbers(x + k * kIntPanel + v * kInts * D::depth);
    for (int r = 0; r < kIntTile; ++r) {
      const Ints a = broadcast(w + r * stride + k);
      for (int v = 0; v < V; ++v) s[r][v] = D::products(a, b[v], s[r][v]);
    }
  }
  // Unrolled by hand: otherwise the compiler keeps all sums in memory, for a loop that it does not unroll.
  unrolled<kIntTile>([&](auto r) { unrolled<V>([&](auto v) { use(r, v, s[r][v]); }); });
}

// And added to int32 at `to`, in rows of `across`.
template <class D, int V, int depth>
inline void added(Multiplier<false>& t, const typename D::Code* w, int64_t stride, const typename D::Number* x,
                  int64_t apart, int64_t count, float* to, int64_t across) {
  multiply<D, V, depth>(t, w, stride, x, apart, count, [&](int r, int v, Ints p) {
    float* at = to + r * across + v * kInts;
    store_ints(at, add(numbers(at), p));
  });
}
#endif

}  // namespace bitfold
