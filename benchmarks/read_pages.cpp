// Bytes a second that two threads read, from memory in pages of 4 KiB and of 2 MiB: `cpu_pages.py` compiles and runs it.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>

constexpr size_t kBytes = size_t(384) << 20, kPage = size_t(2) << 20;

static void read(const char* from, size_t size) {
  __m256i sums[4] = {};
  for (size_t i = 0; i < size; i += 128)
    for (int j = 0; j < 4; ++j)
      sums[j] = _mm256_add_epi32(sums[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i + 32 * j)));
  const __m256i all = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
  volatile int kept = _mm256_extract_epi32(all, 0);
  (void)kept;
}

int main() {
  for (const bool large : {false, true}) {
    void* const given = mmap(nullptr, kBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (given == MAP_FAILED) return 2;
    char* const at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(given) + kPage - 1) / kPage * kPage);
    madvise(at, kBytes, large ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::memset(at, 1, kBytes);
    double best = 1e9;
    for (int round = 0; round < 20; ++round) {
      const auto start = std::chrono::steady_clock::now();
      std::thread other(read, at + kBytes / 2, kBytes / 2);
      read(at, kBytes / 2);
      other.join();
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::printf("%.4e\n", kBytes / best);
    munmap(given, kBytes + kPage);
  }
}
