// Dynamic scheduling over torch's threads: if one core is slow (because of another process, or
// another guest on the host), the others do more work instead of waiting for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace resfast {

// Calls `work(first, last)` for all of `count`, in multiples of `unit` except for the last part:
// large parts first, then smaller ones, so that threads finish together.
template <class Work>
void share_all(int64_t count, int64_t unit, Work work) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t first = taken.load(std::memory_order_relaxed);
    while (first < count) {
      const int64_t fair = (count - first) / (2 * threads) / unit * unit;
      const int64_t last =
          threads == 1 ? count : std::min(count, first + std::max(fair, unit));
      if (!taken.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
      work(first, last);
      first = taken.load(std::memory_order_relaxed);
    }
  });
}

template <class Work>
void share_all(int64_t count, Work work) {
  share_all(count, 1, work);
}

} // namespace resfast
