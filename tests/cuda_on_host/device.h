// The primitives of csrc/cuda/common/device.h on the host: one thread block at a time, with threads
// as coroutines, so that the unmodified kernels run under the sanitizers. Every primitive
// guarantees only what the PTX ISA does: an asynchronous copy overwrites its target with garbage at
// once and arrives when its thread waits for it, a warp runs as far as possible while the others
// wait, and divergence of a warp at an instruction aborts the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if !defined(__x86_64__) || defined(RESFAST_UCONTEXT)
#undef RESFAST_UCONTEXT
#define RESFAST_UCONTEXT
#include <ucontext.h>
#endif

#define RESFAST_DEVICE inline
#define RESFAST_UNROLL

namespace resfast::device {

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

[[noreturn]] inline void broken(const char* what) {
  std::fprintf(stderr, "kernel on the host: %s\n", what);
  std::abort();
}
inline void require(bool holds, const char* what) {
  if (!holds) broken(what);
}
inline bool aligned_to(const void* memory, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(memory) % bytes == 0;
}

// -- coroutines ----------------------------------------------------------------------------------

constexpr size_t kStackBytes = 128 * 1024;
void coroutine_main();

#ifndef RESFAST_UCONTEXT
// Callee-saved registers are pushed on the stack; a context is just a stack pointer.
struct Context {
  void* stack = nullptr;
  void start(char* memory) {
    void** top = reinterpret_cast<void**>(memory + kStackBytes);
    *--top = nullptr;                                   // keeps the stack aligned as at a call
    *--top = reinterpret_cast<void*>(&coroutine_main);  // return address
    top -= 6;                                           // rbp, rbx, r12 to r15
    std::memset(top, 0, 6 * sizeof(void*));
    stack = top;
  }
};
extern "C" void resfast_switch(void** from, void* to);
#define RESFAST_DEFINE_SWITCH                                                             \
  asm(".text\n.globl resfast_switch\n.type resfast_switch, @function\nresfast_switch:\n"  \
      "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"    \
      "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"                                            \
      "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n");
inline void switch_context(Context& from, Context& to) { resfast_switch(&from.stack, to.stack); }
#else
struct Context {
  ucontext_t context;
  void start(char* memory) {
    getcontext(&context);
    context.uc_stack.ss_sp = memory;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, coroutine_main, 0);
  }
};
#define RESFAST_DEFINE_SWITCH
inline void switch_context(Context& from, Context& to) {
  swapcontext(&from.context, &to.context);
}
#endif

// -- a thread block ------------------------------------------------------------------------------

struct Copy {
  char* to;
  const char* from; // null: zeros
  int group;        // index of the thread's group; -1: not committed
};

enum class State { kReady, kAtBarrier, kDone };

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  std::vector<Copy> copies;
  int groups = 0; // committed
};

// Operands of the lanes of a warp for an instruction that they execute together.
struct Warp {
  const char* instruction = nullptr;
  int arrived = 0;
  unsigned round = 0;
  void* operands[32] = {};
};

struct Block {
  unsigned x = 0, y = 0;
  int current = 0;
  Context scheduler;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::function<void()> body;
};
extern Block* block;

inline Thread& self() { return block->threads[static_cast<size_t>(block->current)]; }
inline void yield() { switch_context(self().context, block->scheduler); }

// Runs `body` as every thread of a block. `order` selects the warp, and its lane, that runs first
// between two barriers.
void run_block(
    unsigned x, unsigned y, int threads, size_t shared_bytes, unsigned order,
    const std::function<void()>& body);

// Waits for the whole warp; the last lane to arrive executes `instruction` for all.
template <class Execute>
void together(const char* instruction, void* operands, Execute execute) {
  Warp& warp = block->warps[static_cast<size_t>(block->current / 32)];
  if (warp.arrived == 0) warp.instruction = instruction;
  require(std::strcmp(warp.instruction, instruction) == 0, "lanes of a warp diverge");
  warp.operands[block->current % 32] = operands;
  const unsigned round = warp.round;
  if (++warp.arrived < 32) {
    while (warp.round == round) yield();
    return;
  }
  execute(warp.operands);
  warp.arrived = 0;
  ++warp.round;
}

// -- primitives ----------------------------------------------------------------------------------

inline int thread_index() { return block->current; }
inline unsigned block_x() { return block->x; }
inline unsigned block_y() { return block->y; }
inline char* shared_memory() { return block->shared; }

inline void sync_threads() {
  self().state = State::kAtBarrier;
  yield();
}
inline void sync_warp() {
  together("syncwarp", nullptr, [](void**) {});
}

using Shared = char*;
inline Shared shared_address(char* memory) { return memory; }
inline void require_shared(const char* memory, size_t bytes) {
  require(
      memory >= block->shared && memory + bytes <= block->shared + block->shared_bytes,
      "address outside the block's shared memory");
  require(aligned_to(memory, 16), "address in shared memory is not aligned to 16 bytes");
}

inline void copy_async(Shared to, const void* from, bool valid) {
  require_shared(to, 16);
  require(aligned_to(from, 16), "cp.async from memory that is not aligned to 16 bytes");
  std::memset(to, 0xFF, 16); // NaN in every type
  self().copies.push_back({to, valid ? static_cast<const char*>(from) : nullptr, -1});
}

inline void commit_copies() {
  Thread& thread = self();
  for (Copy& copy : thread.copies)
    if (copy.group < 0) copy.group = thread.groups;
  ++thread.groups;
}

template <int kPending>
void wait_copies() {
  Thread& thread = self();
  std::vector<Copy> left;
  for (const Copy& copy : thread.copies) {
    if (copy.group < 0 || copy.group >= thread.groups - kPending) {
      left.push_back(copy);
    } else if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  thread.copies.swap(left);
}

inline void store_shared(Shared to, uint4 value) {
  require_shared(to, 16);
  std::memcpy(to, &value, 16);
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float bf16_to_float(uint16_t bits) { return float_of(uint32_t{bits} << 16); }
inline uint16_t float_to_bf16(float value) { // to nearest, ties to even
  const uint32_t bits = bits_of(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float fp16_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline uint16_t float_to_fp16(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint32_t round_to_tf32(float value) { // to nearest, ties away from zero
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7F800000) == 0x7F800000) return bits;
  return (bits + 0x1000) & ~uint32_t{0x1FFF};
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

// Lane t receives the 4 bytes at 4 (t % 4) of row t / 4 of each matrix i; lane 8 i + t / 4 passes
// that row's address.
inline void load_matrices(uint32_t (&matrix)[4], Shared row) {
  struct Operands {
    uint32_t* matrix;
    const char* row;
  } mine{matrix, row};
  require_shared(row, 16);
  together("ldmatrix", &mine, [](void** operands) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const char* from = static_cast<Operands*>(operands[8 * i + lane / 4])->row;
        std::memcpy(&static_cast<Operands*>(operands[lane])->matrix[i], from + lane % 4 * 4, 4);
      }
    for (int i = 0; i < 4; ++i) {
      unsigned banks = 0; // one bit per group of 4 banks
      for (int j = 0; j < 8; ++j)
        banks |= 1u << (static_cast<Operands*>(operands[8 * i + j])->row - block->shared) / 16 % 8;
      require(banks == 0xFF, "ldmatrix with a bank conflict");
    }
  });
}

// m16n8, a row of fragments is 32 bytes. With g = lane / 4 and t = lane % 4, the registers of a
// lane hold 4 bytes each: a0 is row g, word t; a1 row g + 8; a2 and a3 the same rows, word t + 4;
// b0 and b1 column g, words t and t + 4; the sums are (g, 2t), (g, 2t + 1), and the same of g + 8.
struct Fragments {
  float* sum;
  const uint32_t* a;
  const uint32_t* b;
};

// `unpack` converts a word to kPerWord floats.
template <int kPerWord, class Unpack>
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) void multiply(
    void** operands, Unpack unpack) {
  constexpr int kDepth = 8 * kPerWord;
  float a[16][kDepth], b[kDepth][8], sums[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& in = *static_cast<Fragments*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < kPerWord; ++e)
        a[g + i % 2 * 8][(t + i / 2 * 4) * kPerWord + e] = unpack(in.a[i], e);
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < kPerWord; ++e) b[(t + i * 4) * kPerWord + e][g] = unpack(in.b[i], e);
    for (int i = 0; i < 4; ++i) sums[g + i / 2 * 8][2 * t + i % 2] = in.sum[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) sums[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Fragments*>(operands[lane])->sum[i] =
          sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

inline void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine{sum, a, b};
  together("mma.bf16", &mine, [](void** operands) {
    multiply<2>(operands, [](uint32_t word, int e) {
      return bf16_to_float(static_cast<uint16_t>(word >> 16 * e));
    });
  });
}

inline void mma_fp16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine{sum, a, b};
  together("mma.fp16", &mine, [](void** operands) {
    multiply<2>(operands, [](uint32_t word, int e) {
      return fp16_to_float(static_cast<uint16_t>(word >> 16 * e));
    });
  });
}

// Only the TF32 bits are used.
inline void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments mine{sum, a, b};
  together("mma.tf32", &mine, [](void** operands) {
    multiply<1>(operands, [](uint32_t word, int) { return float_of(word & ~uint32_t{0x1FFF}); });
  });
}

} // namespace resfast::device
