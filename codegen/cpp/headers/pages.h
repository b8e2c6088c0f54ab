// Weights in pages of 2 MiB: what is read from end to end is read half as fast again there (EPYC, two threads: 62 GB/s
// where pages of 4 KiB give 40, benchmarks/cpu_pages.py), as a processor fetches ahead only within a page and looks each
// page up.
//
// Memory stays where it is: Linux is asked, when a weight is first read, to gather the pages around it. Weights of less
// than a page share one with others, and with whatever else lies there; a page is gathered once a quarter of it is
// weights, so that no more memory than four times theirs can be taken up by what was free before. Nobody says when one is
// freed: it counts on, and another of its size in its place is not asked for again. Elsewhere, before Linux 6.1, and where
// the system says no, as for memory that somebody wants in small pages (MADV_NOHUGEPAGE), nothing happens.
#pragma once
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitfold {

class Pages {
 public:
  // `size` bytes at `data` are a weight's.
  void holds(const void* data, int64_t size) {
    const auto first = reinterpret_cast<uintptr_t>(data);
    {
      std::shared_lock<std::shared_mutex> lock(guard_);
      const auto found = known_.find(first);
      if (found != known_.end() && found->second == size) return;
    }
    std::unique_lock<std::shared_mutex> lock(guard_);
    if (known_.size() > kMost) known_.clear(), covered_.clear();  // of weights that came and went
    const auto found = known_.find(first);
    if (found != known_.end() && found->second == size) return;
    if (found != known_.end()) count_out(first, found->second);
    known_[first] = size;
    const uintptr_t end = first + static_cast<uintptr_t>(size);
    uintptr_t from = 0, to = 0;  // neighbours are asked for together
    for (uintptr_t page = first / kPage * kPage; page < end; page += kPage) {
      const uintptr_t before = covered_[page];
      const uintptr_t now = covered_[page] += std::min(end, page + kPage) - std::max(first, page);
      if (before * 4 >= kPage || now * 4 < kPage) continue;
      if (page != to) gather(from, to), from = page;
      to = page + kPage;
    }
    gather(from, to);
  }

 private:
  static constexpr uintptr_t kPage = uintptr_t(2) << 20;
  static constexpr size_t kMost = size_t(1) << 16;

  // Another weight lies where one was.
  void count_out(uintptr_t first, int64_t size) {
    const uintptr_t end = first + static_cast<uintptr_t>(size);
    for (uintptr_t page = first / kPage * kPage; page < end; page += kPage)
      covered_[page] -= std::min(end, page + kPage) - std::max(first, page);
  }

  static void gather(uintptr_t from, uintptr_t to) {
#if defined(__linux__)
    if (from == to) return;
    constexpr int collapse = 25;  // MADV_COLLAPSE, of Linux 6.1; older headers do not name it
    madvise(reinterpret_cast<void*>(from), to - from, collapse);
#else
    (void)from, (void)to;
#endif
  }

  std::shared_mutex guard_;
  std::unordered_map<uintptr_t, int64_t> known_;      // where a weight begins -> its bytes
  std::unordered_map<uintptr_t, uintptr_t> covered_;  // page -> bytes of it that weights hold
};

}  // namespace bitfold
