#include "cluster.h"

RESFAST_DEFINE_SWITCH

namespace resfast::device {

Block* block = nullptr;
Cluster* cluster = nullptr;

void coroutine_main() {
  block->body();
  self().state = State::kDone;
  yield();
  broken("a thread that has ended runs on");
}

namespace {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Memory of exactly this size, so that the address sanitizer detects overruns, filled with garbage.
Memory spoiled(size_t bytes) {
  const size_t rounded = (bytes + 127) / 128 * 128;
  Memory memory(static_cast<char*>(std::aligned_alloc(128, rounded)));
  std::memset(memory.get(), 0xFF, rounded);
  return memory;
}

void start(Block& one, unsigned x, unsigned y, int threads, const std::function<void()>& body) {
  one.x = x;
  one.y = y;
  one.body = body;
  one.threads.resize(static_cast<size_t>(threads));
  one.warps.assign(static_cast<size_t>(threads / 32), {});
  for (Thread& thread : one.threads) {
    thread.state = State::kReady;
    thread.copies.clear();
    thread.groups = 0;
    thread.context.start(thread.stack.get());
  }
}

// Runs every warp of the current block until its threads have reached a barrier or ended.
void run_warps(unsigned order) {
  const int warps = static_cast<int>(block->warps.size());
  for (int i = 0; i < warps; ++i) {
    const int warp = order % 2 ? warps - 1 - i : i;
    for (bool ran = true; ran;) {
      ran = false;
      for (int j = 0; j < 32; ++j) {
        block->current = warp * 32 + (order % 3 ? 31 - j : j);
        if (self().state != State::kReady) continue;
        ran = true;
        switch_context(block->scheduler, self().context);
      }
      if (ran && block->warps[static_cast<size_t>(warp)].arrived > 0) {
        // A lane that waits at the barrier or has ended will not reach the instruction.
        for (int j = 0; j < 32; ++j)
          require(
              block->threads[static_cast<size_t>(warp * 32 + j)].state == State::kReady,
              "a lane waits for one at a barrier");
      }
    }
  }
}

// Runs the current block to its end or to the cluster's barrier; returns whether it has ended.
bool run_to_cluster_barrier(unsigned order) {
  const std::vector<bool>& at_cluster = cluster->at_barrier[static_cast<size_t>(cluster->current)];
  const int threads = static_cast<int>(block->threads.size());
  for (;; ++order) {
    run_warps(order);
    int waiting = 0, for_cluster = 0;
    for (const Thread& thread : block->threads) waiting += thread.state == State::kAtBarrier;
    for (const bool one : at_cluster) for_cluster += one;
    if (waiting == 0) return true; // all others have ended
    require(
        waiting == threads && (for_cluster == 0 || for_cluster == threads),
        "a barrier that not every thread of the block reaches");
    if (for_cluster > 0) return false;
    for (Thread& thread : block->threads) thread.state = State::kReady;
  }
}

} // namespace

void run_cluster(
    unsigned first, unsigned y, int size, int threads, size_t shared_bytes, unsigned order,
    const std::function<void()>& body) {
  static Cluster one; // reuses the stacks
  require(threads % 32 == 0, "a block has whole warps");
  cluster = &one;
  const size_t count = static_cast<size_t>(size), per_block = static_cast<size_t>(threads);
  one.blocks.resize(count);
  one.at_barrier.assign(count, std::vector<bool>(per_block, false));
  one.started = false;
  std::vector<Memory> memory;
  for (size_t i = 0; i < count; ++i) {
    start(one.blocks[i], first + static_cast<unsigned>(i), y, threads, body);
    memory.push_back(spoiled(shared_bytes));
    one.blocks[i].shared = memory[i].get();
    one.blocks[i].shared_bytes = shared_bytes;
  }

  for (;; ++order) {
    int ended = 0;
    for (int i = 0; i < size; ++i) {
      one.current = order % 2 ? i : size - 1 - i;
      block = &one.blocks[static_cast<size_t>(one.current)];
      ended += run_to_cluster_barrier(order + static_cast<unsigned>(i));
    }
    if (ended == size) break;
    require(ended == 0, "a barrier that not every block of the cluster reaches");
    one.started = true;
    for (size_t i = 0; i < count; ++i) {
      one.at_barrier[i].assign(per_block, false);
      for (Thread& thread : one.blocks[i].threads) thread.state = State::kReady;
    }
  }
  for (const Block& each : one.blocks)
    for (const Thread& thread : each.threads)
      require(thread.copies.empty(), "asynchronous copies that nobody waited for");
}

void run_block(
    unsigned x, unsigned y, int threads, size_t shared_bytes, unsigned order,
    const std::function<void()>& body) {
  run_cluster(x, y, 1, threads, shared_bytes, order, body);
}

} // namespace resfast::device
