// What a core multiplies at most: products a second of each way of adding them up, from registers.
//
//   cpu_peaks 0.2      ->   "vfmadd ymm 5.6e+10\n..", each the best of runs for so many seconds
//
// Twelve sums that do not wait for each other, of one number times another that stay where they are. `vpmaddubsw
// vpmaddwd vpaddd` and `vpdpbusd zmm` are no kernel's bound: docs/notes/cpu.md compares what kernels do with them.
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kSums = 12, kRounds = 1 << 14;

template <class V, class Step> double rate(double seconds, int products, V a, V b, Step step) {
  using clock = std::chrono::steady_clock;
  const auto end = clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  while (clock::now() < end) {
    V s[kSums] = {};
    const auto started = clock::now();
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) {
        asm volatile("" : "+v"(a), "+v"(b));  // or products of the same two are made once for all sums
        s[i] = step(a, b, s[i]);
        asm volatile("" : "+v"(s[i]));
      }
    }
    const double took = std::chrono::duration<double>(clock::now() - started).count();
    const double found = double(kRounds) * kSums * products / took;
    best = found > best ? found : best;
  }
  return best;
}

}  // namespace

int main(int, char** given) {
  const double seconds = std::atof(given[1]);
  const auto say = [](const char* name, double found) { std::printf("%s %.4g\n", name, found); };
  const __m256i ones = _mm256_set1_epi16(1), codes = _mm256_set1_epi8(3);
  const __m256 f = _mm256_set1_ps(1.0f);
  say("vfmadd ymm", rate(seconds, 8, f, f, [](auto a, auto b, auto s) { return _mm256_fmadd_ps(a, b, s); }));
  say("vpmaddwd vpaddd ymm", rate(seconds, 16, codes, codes, [](auto a, auto b, auto s) {
        return _mm256_add_epi32(s, _mm256_madd_epi16(a, b));
      }));
  say("vpmaddubsw vpaddw ymm", rate(seconds, 32, codes, codes, [](auto a, auto b, auto s) {
        return _mm256_add_epi16(s, _mm256_maddubs_epi16(a, b));
      }));
  say("vpmaddubsw vpmaddwd vpaddd ymm", rate(seconds, 32, codes, codes, [&](auto a, auto b, auto s) {
        return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
      }));
#ifdef __AVX512VNNI__
  const __m512i wide = _mm512_set1_epi8(3);
  const __m512 g = _mm512_set1_ps(1.0f);
  say("vfmadd zmm", rate(seconds, 16, g, g, [](auto a, auto b, auto s) { return _mm512_fmadd_ps(a, b, s); }));
  say("vpdpbusd ymm", rate(seconds, 32, codes, codes, [](auto a, auto b, auto s) { return _mm256_dpbusd_epi32(s, a, b); }));
  say("vpdpbusd zmm", rate(seconds, 64, wide, wide, [](auto a, auto b, auto s) { return _mm512_dpbusd_epi32(s, a, b); }));
#endif
}
