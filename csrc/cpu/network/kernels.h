// What the kernels of all instruction sets share: the memory of a plan, and the table of kernels.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../conv/conv_bf16.h"
#include "plan.h"

namespace resfast::network {

constexpr int64_t kMostPatch = 512; // values

// Activations of networks only, numbered as in resfast/ops/network/layers.py.
enum NetworkActivation : int64_t { kRelu6 = kGelu + 1, kHardswish, kHardsigmoid, kSigmoid };

// The input of the plan, [N, C, H, W] of bfloat16 or float32 in any memory order.
struct Input {
  const void* values;
  bool wide; // float32
  bool lined_up; // in channels_last memory, of the dtype of the lines
  int64_t stride[4]; // in values
};

struct Memory {
  Input input;
  int64_t first; // image of the item in the batch
  int64_t images; // that there are from the item's first one on
  void* result; // [N, P, Q, K], or float32 [N, K] of a head; from the item's first image on
  bool wide_result; // float32, otherwise bfloat16
  const float* head; // [K, C]
  const float* head_bias; // [K], or null
  char* arena; // of the item
  const char* constants;
  const int32_t* tables;

  char* line(int64_t index) const { return arena + index * kLine; }
};

// The line of a pixel, from the start of a block of a map.
inline int64_t line_of(const Map& map, int64_t image, int64_t row, int64_t column) {
  const int64_t phase = row % map.phases * map.phases + column % map.phases;
  const int64_t plane = image / map.group * map.phases * map.phases + phase;
  const int64_t place = (plane * map.rows + row / map.phases) * map.pitch + column / map.phases;
  return map.lead + place * map.group + image % map.group;
}

// The lines of a row's pixels, without a division for each.
struct RowLines {
  RowLines(const Map& map, int64_t image, int64_t row)
      : even(line_of(map, image, row, 0)),
        odd(line_of(map, image, row, 1)),
        step(map.group),
        shift(map.phases == 2 ? 1 : 0) {}
  int64_t at(int64_t column) const {
    return (shift & column ? odd : even) + (column >> shift) * step;
  }

  int64_t even, odd, step, shift;
};

// Memory of one thread for some megabytes, kept between calls; in huge pages where Linux has them.
class LargeWorkspace {
 public:
  float* get(int64_t count) {
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t bytes = round_up(count * sizeof(float), kHugePage);
    if (bytes > bytes_) {
      memory_.reset(), bytes_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(kHugePage, bytes)));
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
#if defined(__linux__)
      madvise(memory_.get(), bytes, MADV_HUGEPAGE); // without them it is only slower
#endif
      std::fill(memory_.get(), memory_.get() + bytes / sizeof(float), 0.0f);
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t bytes_ = 0;
};

// The kernels of one kind of lines and one instruction set. All take a part of a step: tiles, rows of
// the result or images `begin` to `end`, and panels or outputs `first` to `last`.
struct Kernels {
  using Part = void (*)(const Step&, const Memory&, int64_t begin, int64_t end);
  using PanelPart = void (*)(
      const Step&, const Memory&, int64_t begin, int64_t end, int64_t first, int64_t last);
  PanelPart conv, winograd, gathered, head; // gathered: of bfloat16 only
  Part depthwise, patches, enter, max_pool, average_pool, mean, pointwise;
};

extern const Kernels kF32Avx2, kF32Avx512; // for lines of float32

} // namespace resfast::network
