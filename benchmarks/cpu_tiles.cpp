// What operations on tiles cost, one thread, in nanoseconds each; cycles by a chain of multiplications, three
// cycles each: some processors do additions of a constant before they would be executed.
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "avx512.h"
#include "numbers.h"

using namespace bitfold;

template <class F> double ns(int64_t count, F&& once) {
  double best = 1e9;
  for (int repeat = 0; repeat < 7; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < count; ++i) once(i);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / double(count));
  }
  return best;
}

void say(const char* what, double each, bool last = false) { std::printf("\"%s\": %.3f%s\n", what, each, last ? "" : ","); }

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 1;
  constexpr int64_t size = 8 << 20;
  auto* const memory = static_cast<uint8_t*>(std::aligned_alloc(1 << 21, size));
  for (int64_t i = 0; i < size; ++i) memory[i] = uint8_t(i * 7);
  std::printf("{\n");
  say("cycle", ns(1 << 16, [](int64_t) {
        asm volatile(".rept 64\n imul $3, %%rax, %%rax\n .endr" ::: "rax", "cc");
      }) / 64 / 3);
  {
    __m512i s[8] = {};
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    say("vpdpbusd, 512 bits", ns(1 << 16, [&](int64_t) {
          unrolled<8>([&](auto i) { s[i] = _mm512_dpbusd_epi32(s[i], a, b); asm volatile("" : "+v"(s[i])); });
        }) / 8);
    __m256i t[8] = {};
    const __m256i c = _mm256_set1_epi8(3), d = _mm256_set1_epi8(5);
    say("vpdpbusd, 256 bits", ns(1 << 16, [&](int64_t) {
          unrolled<8>([&](auto i) { t[i] = _mm256_dpbusd_epi32(t[i], c, d); asm volatile("" : "+v"(t[i])); });
        }) / 8);
  }
  Tiles t(4, 6, 64);
  unrolled<4>([&](auto i) { t.zero<i.value>(); });
  t.load<4>(memory, 64), t.load<5>(memory, 64), t.load<6>(memory, 64), t.load<7>(memory, 64);
  say("tdpbusd, four sums", ns(1 << 14, [&](int64_t) {
        t.unsigned_codes<0, 4, 6>(), t.unsigned_codes<1, 4, 7>(), t.unsigned_codes<2, 5, 6>(), t.unsigned_codes<3, 5, 7>();
      }) / 4);
  const auto loads = [&](const char* what, int64_t within, int64_t stride) {
    say(what, ns(1 << 14, [&](int64_t i) {
          const uint8_t* at = memory + i * 4096 % within;
          t.load<4>(at, stride), t.load<5>(at + 1024, stride), t.load<6>(at + 2048, stride), t.load<7>(at + 3072, stride);
        }) / 4);
  };
  loads("tileloadd, first level", 16 << 10, 64);
  loads("tileloadd, second level", 512 << 10, 64);
  loads("tileloadd, 8 MiB", 4 << 20, 64);
  loads("tileloadd, rows 576 bytes apart, first level", 4 << 10, 576);
  const auto both = [&](const char* what, int64_t codes, int64_t numbers) {
    say(what, ns(1 << 14, [&](int64_t i) {
          const uint8_t *w = memory + (4 << 20) + i * 64 % codes, *x = memory + i * 1024 % numbers;
          t.load<4>(w, 576), t.load<6>(x, 64);
          t.unsigned_codes<0, 4, 6>();
          t.load<5>(w + 16 * 576, 576);
          t.unsigned_codes<2, 5, 6>();
          t.load<7>(x + numbers, 64);
          t.unsigned_codes<1, 4, 7>();
          t.unsigned_codes<3, 5, 7>();
        }) / 4);
  };
  both("tdpbusd and its loads, first level", 512, 8 << 10);
  both("tdpbusd and its loads, x in the second", 512, 512 << 10);
  both("tdpbusd and its loads, x in the third", 512, 2 << 20);
  say("tilestored", ns(1 << 14, [&](int64_t i) { t.store<0>(memory + i * 1024 % (16 << 10), 64); }));
  say("tilestored, rows 1088 bytes apart", ns(1 << 14, [&](int64_t i) { t.store<0>(memory + i * 64 % 1024, 1088); }));
  alignas(64) int32_t sums[16][16];
  Floats all = zeros();
  say("tdpbusd, stored, read in vectors", ns(1 << 14, [&](int64_t) {
        t.zero<0>(), t.unsigned_codes<0, 4, 6>(), t.store<0>(sums, 64);
        unrolled<16>([&](auto r) { all = plus(all, _mm512_cvtepi32_ps(_mm512_load_si512(sums[r]))); });
        asm volatile("" : "+v"(all));
      }));
  say("ldtilecfg and tilerelease", ns(1 << 12, [&](int64_t) { Tiles other(4, 6, 64); }), true);
  std::printf("}\n");
  std::free(memory);
  return 0;
}
