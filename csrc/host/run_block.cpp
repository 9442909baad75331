#include "device.h"

RESFAST_DEFINE_SWITCH

namespace resfast::device {

Block* block = nullptr;

void coroutine_main() {
  block->body();
  self().state = State::kDone;
  yield();
  broken("a thread that has ended runs on");
}

void run_block(
    unsigned x, unsigned y, int threads, size_t shared_bytes, unsigned order,
    const std::function<void()>& body) {
  static Block one; // stacks are used again
  require(threads % 32 == 0, "a block has whole warps");
  block = &one;
  one.x = x;
  one.y = y;
  one.body = body;
  one.threads.resize(static_cast<size_t>(threads));
  one.warps.assign(static_cast<size_t>(threads / 32), {});
  // Of its exact size, so that the address sanitizer sees every access beyond it; spoiled.
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  const size_t rounded = (shared_bytes + 127) / 128 * 128;
  std::unique_ptr<char, Free> shared(static_cast<char*>(std::aligned_alloc(128, rounded)));
  std::memset(shared.get(), 0xFF, rounded);
  one.shared = shared.get();
  one.shared_bytes = shared_bytes;
  for (Thread& thread : one.threads) {
    thread.state = State::kReady;
    thread.copies.clear();
    thread.groups = 0;
    thread.context.start(thread.stack.get());
  }

  const int warps = threads / 32;
  for (;; ++order) {
    for (int i = 0; i < warps; ++i) {
      const int warp = order % 2 ? warps - 1 - i : i;
      for (bool ran = true; ran;) {
        ran = false;
        for (int j = 0; j < 32; ++j) {
          one.current = warp * 32 + (order % 3 ? 31 - j : j);
          if (self().state != State::kReady) continue;
          ran = true;
          switch_context(one.scheduler, self().context);
        }
        if (ran && one.warps[static_cast<size_t>(warp)].arrived > 0) {
          // A lane that stands at the barrier or has ended will not come to the instruction.
          for (int j = 0; j < 32; ++j)
            require(
                one.threads[static_cast<size_t>(warp * 32 + j)].state == State::kReady,
                "a lane waits for one at a barrier");
        }
      }
    }
    int done = 0, waiting = 0;
    for (Thread& thread : one.threads) {
      done += thread.state == State::kDone;
      waiting += thread.state == State::kAtBarrier;
    }
    if (done == threads) break;
    require(waiting == threads, "a barrier that not every thread of the block reaches");
    for (Thread& thread : one.threads) thread.state = State::kReady;
  }
  for (const Thread& thread : one.threads)
    require(thread.copies.empty(), "asynchronous copies that nobody waited for");
}

} // namespace resfast::device
