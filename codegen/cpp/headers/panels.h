// Products with many rows of x: decoded rows of the weight times panels of x, in registers.
//
// A panel is x turned: a vector holds the same number of neighbouring rows, so that each number of the weight is
// broadcast and multiplies whole vectors, and no sum goes across one. kTile rows of the weight and two vectors keep
// all sums in registers. Stands behind VECTORS.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "transposed.h"

namespace bitfold {

constexpr int kPanel = 2 * kFloats;   // rows of x side by side, as floats
constexpr int kIntPanel = 2 * kInts;  // and as integers

// Codes of decoded rows by stretches that share their scales, `count` of them.
struct Stretches {
  int64_t count;
  const int32_t* starts;        // [count][kIntPanel or two of them]: what sums of integers start with
  const float *scales, *zeros;  // [kStored][most]
  const float* const* x_sums;   // [count]: what zeros are multiplied by, null where nothing is
};

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

constexpr int kEnds = 8;       // rows of x whose sums are taken out of the way that they lie in at a time
#endif
static_assert(kStored % kTile == 0 && kStored % kEnds == 0);

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

constexpr int kLeast = 9;  // rows of x, as floats, from which on they are turned; Deep<bits>::least, as integers

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
                                     Deep<bits>::least, kStored, 0, 0, 0, kTiled, 0, 0, lanes, 0};
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
[[gnu::noinline]] void multiply(
    const float* w, int64_t stride, const float* x, int64_t count, float* sums, int64_t across) {
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
  for (int i = 0; i < many; ++i)
    for (int r = 0; r < kStored; r += kEnds) {
      const float* const from = sums + (i * kStored + r) * across;
      if constexpr (kEnds == 16)
        transposed(from, across * int64_t(sizeof(float)), &to[0][i][r][0], sizeof to[0]);
      else
        transposed8(from, across * int64_t(sizeof(float)), &to[0][i][r][0], sizeof to[0]);
    }
}

#if !defined(BITFOLD_TILES)
// Products of `count` codes of D::tile rows and of V vectors of rows of x, exactly. `start(r, v)` is what they are added
// to; `use(r, v, s)` has the sums. Both are unrolled by hand: otherwise the compiler keeps all sums in memory, for a loop
// that it does not unroll.
// runs: steps whose sums are widened together, D::runs at most; `count` is whole ones.
template <class D, int V, int runs, class Start, class Use>
[[gnu::always_inline]] inline void products_of(const typename D::Code* w, int64_t stride, const typename D::Number* x,
                                               int64_t count, Start&& start, Use&& use) {
  Ints s[D::tile][V];
  unrolled<D::tile>([&](auto r) { unrolled<V>([&](auto v) { s[r][v] = start(r, v); }); });
  const auto step = [&](int64_t k, auto&& add_to) {
    Ints b[V];
    unrolled<V>([&](auto v) { b[v] = in_register(numbers(x + k * kIntPanel + v * kInts * D::depth)); });
    unrolled<D::tile>([&](auto r) {
      const Ints a = broadcast(w + r * stride + k);
      unrolled<V>([&](auto v) { add_to(r, v, a, b[v]); });
    });
  };
  if constexpr (runs == 1) {
    for (int64_t k = 0; k < count; k += D::depth)
      step(k, [&](auto r, auto v, Ints a, Ints b) { s[r][v] = in_register(D::products(a, b, s[r][v])); });
  } else {
    // Narrow sums first, of as many products as they hold.
    for (int64_t k = 0; k < count; k += runs * D::depth) {
      Ints n[D::tile][V];
      unrolled<runs>([&](auto i) {
        step(k + i * D::depth, [&](auto r, auto v, Ints a, Ints b) {
          n[r][v] = in_register(i == 0 ? D::narrow(a, b) : D::narrow(a, b, n[r][v]));
        });
      });
      unrolled<D::tile>([&](auto r) { unrolled<V>([&](auto v) { s[r][v] = D::widened(n[r][v], s[r][v]); }); });
    }
  }
  unrolled<D::tile>([&](auto r) { unrolled<V>([&](auto v) { use(r, v, s[r][v]); }); });
}

// Added to int32 at `to`, in rows of `across`. Not inlined, like the next one: inside of `many` the compiler writes all
// sums to the stack behind every product.
template <class D, int V, int>
[[gnu::noinline]] void added(Multiplier<false>&, const typename D::Code* w, int64_t stride,
                             const typename D::Number* x, int64_t, int64_t count, float* to, int64_t across) {
  static_assert(32 % (D::runs * D::depth) == 0, "codes of whole rows are decoded by 32");
  products_of<D, V, D::runs>(
      w, stride, x, count, [&](int r, int v) { return numbers(to + r * across + v * kInts); },
      [&](int r, int v, Ints p) { store_ints(to + r * across + v * kInts, p); });
}

// Stretches of rows r0 .. r0 + D::tile - 1, `most` at most, added to float32 at `to`: products and what they start with
// are integers, times a scale of each row; where there are zeros, they times x's sums.
template <class D, int V, int, int stretch, int most, bool zeros>
[[gnu::noinline]] void scaled_and_added(Multiplier<false>&, const typename D::Code* w, int64_t stride,
                                        const typename D::Number* x, int64_t, const Stretches& of, int64_t r0, float* to,
                                        int64_t across) {
  // Groups may be of 16, or 48, codes.
  constexpr int runs = std::gcd(D::runs, stretch / D::depth);
  static_assert(stretch % D::depth == 0);
  for (int64_t i = 0; i < of.count; ++i) {
    const int32_t* const start = of.starts + i * 2 * kHalf;
    const float *const scales = of.scales + r0 * most + i, *const added = of.zeros + r0 * most + i;
    products_of<D, V, runs>(
        w + i * stretch, stride, x + i * stretch * kIntPanel, stretch,
        [&](int, int v) { return numbers(start + v * kInts); },
        [&](int r, int v, Ints p) {
          float* const at = to + r * across + v * kInts;
          store_sums(at, scaled(p, scales[r * most], load_sums(at)));
        });
    if (!zeros || of.x_sums[i] == nullptr) continue;
    for (int r = 0; r < D::tile; ++r)
      for (int v = 0; v < V; ++v) {
        float* const at = to + r * across + v * kInts;
        store_sums(at, scaled(load_sums(of.x_sums[i] + v * kInts), added[r * most], load_sums(at)));
      }
  }
}
#endif

}  // namespace bitfold
