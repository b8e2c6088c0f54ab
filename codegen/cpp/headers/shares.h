// Work of many pieces for a few threads: each has a share of its own, one end of memory to the other, and helps with
// others' shares when it is done.
//
//   tasks 0 .. 99, two threads   ->   0 5 10 .. 45 | 50 55 .. 95, five at a time; to one that is held up, less is left
//
// A thread that takes whatever piece is next reads no stream of memory: each piece begins one anew, and a page of
// weights is read by all. What that made of a step of SmolLM2 is in docs/notes/cpu.md ("Kernels of one x").
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace bitfold {

// use(first, last) for all tasks, by up to `threads` threads.
template <class Use> void shared_out(int64_t tasks, int64_t threads, Use&& use) {
  constexpr int64_t pieces = 8;  // of a share
  struct alignas(64) Share {     // a line of the cache each
    std::atomic<int64_t> next;
    int64_t end;
  };
  // On the stack up to so many threads: a step of a small model comes here a hundred times.
  constexpr int64_t most = 64;
  const int64_t count = std::max<int64_t>(threads, 1);
  Share few[most];
  std::vector<Share> many(count > most ? count : 0);
  Share* const shares = count > most ? many.data() : few;
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next.store(tasks * i / count, std::memory_order_relaxed);
    shares[i].end = tasks * (i + 1) / count;
  }
  const int64_t piece = count > 1 ? std::max<int64_t>(1, tasks / (pieces * count)) : tasks;
  // Called for each share or, where torch starts no threads, once: the first share's thread then does all of it.
  torch::stable::parallel_for(0, count, 1, [&](int64_t own, int64_t) {
    for (int64_t i = 0; i < count; ++i) {
      Share& share = shares[(own + i) % count];
      for (int64_t first; (first = share.next.fetch_add(piece, std::memory_order_relaxed)) < share.end;)
        use(first, std::min(first + piece, share.end));
    }
  });
}

}  // namespace bitfold
