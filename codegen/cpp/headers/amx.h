// Tiles of AMX: eight of sixteen rows of 64 bytes; one instruction adds 16 x 16 sums of up to 64 products of bytes each.
//
//   Tiles t(4, 6, 64);          sums in tiles 0 .. 3, codes in 4 and 5, numbers of x in 6 and 7; 64 products a sum
//   t.load<4>(codes, stride);   rows one behind the other, `stride` bytes apart
//   t.load<6>(x, 64);           numbers by fours: [numbers / 4][16 rows of x][4]
//   t.unsigned_codes<0, 4, 6>();
//   t.store<0>(sums, stride);   [16 rows of codes][16 rows of x] of int32
//
// A thread's tiles are set up while a `Tiles` lives and given back by its end: what is left set up is saved and restored
// by each switch of threads. With BITFOLD_AMX_MODEL all of it is plain C++ for any processor, which tests are built with.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AMX_INT8__) || defined(BITFOLD_AMX_MODEL)
#define BITFOLD_TILES
#include <immintrin.h>

namespace bitfold {

constexpr int kTileRows = 16, kTileBytes = 64, kTiles = 8;

#if defined(BITFOLD_AMX_MODEL)

class Tiles {
 public:
  Tiles(int codes, int numbers, int depth) {
    for (int t = 0; t < kTiles; ++t) {
      bytes_[t] = t >= codes && t < numbers ? depth : kTileBytes;
      rows_[t] = t < numbers ? kTileRows : depth / 4;
    }
  }
  template <int t> void zero() { std::memset(at_[t], 0, sizeof at_[t]); }
  template <int t> void load(const void* from, int64_t stride) {
    zero<t>();
    for (int r = 0; r < rows_[t]; ++r) std::memcpy(at_[t][r], static_cast<const char*>(from) + r * stride, bytes_[t]);
  }
  template <int t> void store(void* to, int64_t stride) const {
    for (int r = 0; r < rows_[t]; ++r) std::memcpy(static_cast<char*>(to) + r * stride, at_[t][r], bytes_[t]);
  }
  template <int sums, int codes, int numbers> void unsigned_codes() { products<sums, codes, numbers, uint8_t>(); }
  template <int sums, int codes, int numbers> void signed_codes() { products<sums, codes, numbers, int8_t>(); }

 private:
  template <int sums, int codes, int numbers, class Code> void products() {
    for (int r = 0; r < rows_[sums]; ++r)
      for (int k = 0; k < rows_[numbers]; ++k)
        for (int i = 0; i < bytes_[sums] / 4; ++i) {
          int32_t sum;
          std::memcpy(&sum, at_[sums][r] + 4 * i, 4);
          for (int b = 0; b < 4; ++b)
            sum += static_cast<Code>(at_[codes][r][4 * k + b]) * static_cast<int8_t>(at_[numbers][k][4 * i + b]);
          std::memcpy(at_[sums][r] + 4 * i, &sum, 4);
        }
  }

  uint8_t at_[kTiles][kTileRows][kTileBytes];
  int bytes_[kTiles], rows_[kTiles];
};

#else

class Tiles {
 public:
  Tiles(int codes, int numbers, int depth) {
    struct alignas(64) {
      uint8_t palette, start, none[14];
      uint16_t bytes[kTiles], no_bytes[8];
      uint8_t rows[kTiles], no_rows[8];
    } shape{};
    static_assert(sizeof shape == 64);
    shape.palette = 1;
    for (int t = 0; t < kTiles; ++t) {
      shape.bytes[t] = static_cast<uint16_t>(t >= codes && t < numbers ? depth : kTileBytes);
      shape.rows[t] = static_cast<uint8_t>(t < numbers ? kTileRows : depth / 4);
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease" ::); }
  // Not GCC's intrinsics: those paste the number of a tile as text, which a template's is not.
  template <int t> void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
  template <int t> void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t> void store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
  }
  template <int sums, int codes, int numbers> void unsigned_codes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(codes), "i"(numbers));
  }
  template <int sums, int codes, int numbers> void signed_codes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(codes), "i"(numbers));
  }
};

#endif

}  // namespace bitfold

#endif
