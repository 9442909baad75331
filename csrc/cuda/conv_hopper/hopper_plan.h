// Limits and configurations of the Hopper convolution, and the choice among them. Plain C++ without
// CUDA or CUTLASS.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../conv/conv_plan.h"

namespace resfast::hopper {

using conv::Problem;

// How the warps of a thread block share the work. In each schedule one warp loads operands, one
// loads the residual, and two groups of four warps multiply.
enum class Schedule : int {
  kPingpong,    // each group has its own tile: one stores while the other multiplies
  kCooperative, // each group has half of the tile
  kStreamK      // cooperative, and thread blocks may split the reduction of a tile
};

// Tile of one thread block: m pixels by n filters; `cluster` blocks, adjacent in m, load the
// filters together. A step of the reduction is 64 channels of one position of the kernel.
struct Config {
  int m, n, cluster;
  Schedule schedule;
};

#define RESFAST_HOPPER_CONFIGS(X)           \
  X(0, 128, 64, 1, Schedule::kPingpong)     \
  X(1, 128, 128, 1, Schedule::kPingpong)    \
  X(2, 128, 128, 2, Schedule::kPingpong)    \
  X(3, 256, 64, 1, Schedule::kCooperative)  \
  X(4, 256, 128, 2, Schedule::kCooperative) \
  X(5, 128, 256, 1, Schedule::kCooperative) \
  X(6, 128, 256, 2, Schedule::kCooperative) \
  X(7, 128, 128, 1, Schedule::kStreamK)

inline constexpr Config kConfigs[] = {
#define RESFAST_HOPPER_CONFIG(index, m, n, cluster, schedule) {m, n, cluster, schedule},
    RESFAST_HOPPER_CONFIGS(RESFAST_HOPPER_CONFIG)
#undef RESFAST_HOPPER_CONFIG
};
inline constexpr int kConfigCount = sizeof(kConfigs) / sizeof(Config);
inline constexpr int kChannelsPerStep = 64;

// Why the kernels cannot compute a problem, or "". The limits are those of tensor maps
// (cuTensorMapEncodeIm2col in the CUDA driver API).
inline std::string obstacle(const Problem& problem) {
  const auto says = [](const char* what, int value, const char* expected) {
    return std::string(what) + " is " + std::to_string(value) + "; the kernel for Hopper takes " +
           expected;
  };
  if (problem.batch == 0) return says("the batch", 0, "at least one image");
  if (problem.channels % 8 != 0)
    return says("the number of channels", problem.channels, "a multiple of 8");
  if (problem.filters % 8 != 0)
    return says("the number of filters", problem.filters, "a multiple of 8");
  const int strides[] = {problem.stride_h, problem.stride_w};
  const int paddings[] = {problem.padding_h, problem.padding_w};
  const int kernels[] = {problem.kernel_h, problem.kernel_w};
  for (int i = 0; i < 2; ++i) {
    if (strides[i] > 8) return says("stride", strides[i], "at most 8");
    if (paddings[i] > 127) return says("padding", paddings[i], "at most 127");
    if (kernels[i] - 1 - paddings[i] > 128)
      return says("the kernel's side", kernels[i], "at most 129 beyond the padding");
    if (kernels[i] > 255) return says("the kernel's side", kernels[i], "at most 255");
  }
  return "";
}

// Number of steps of the reduction.
inline int64_t steps(const Problem& problem) {
  return int64_t{problem.kernel_h} * problem.kernel_w *
         conv::ceil_div(problem.channels, kChannelsPerStep);
}

// Estimated cycles on an H100 or H200. A multiprocessor does 2048 multiply-adds per cycle (NVIDIA,
// "H100 Tensor Core GPU Architecture", 2022) and moves 128 bytes to or from shared memory; the
// costs of the start and the epilogue are guesses. Nothing was fitted to measurements.
inline double cost(const Problem& problem, const Config& config) {
  constexpr int kMultiprocessors = 132;
  constexpr double kStart = 1500;         // launch of a block, first loads
  constexpr double kEpilogue = 1.0 / 16;  // per value of the tile
  const int64_t rows = conv::ceil_div(problem.pixels(), config.m * config.cluster) * config.cluster;
  const int64_t tiles = rows * conv::ceil_div(problem.filters, config.n);
  const double multiply = config.m * config.n * kChannelsPerStep / 2048.0;
  // wgmma reads 64 pixels and all filters of the tile per 16 channels; both are written once.
  const double shared = (config.m / 64 * (64 + config.n)) + config.m + config.n;
  const double step = std::max(multiply, shared), count = static_cast<double>(steps(problem));
  const double work = count * step, epilogue = config.m * config.n * kEpilogue;
  const double rounds = static_cast<double>(conv::ceil_div(tiles, kMultiprocessors));
  switch (config.schedule) {
    case Schedule::kPingpong: return kStart + rounds * std::max(work, epilogue) + epilogue;
    case Schedule::kCooperative: return kStart + rounds * (work + epilogue);
    default: { // a block has at least 8 steps; partial sums are written and read
      const double share = static_cast<double>(tiles) / kMultiprocessors;
      return kStart + std::max(share * count, std::min(count, 8.0)) * step +
             (std::max(share, 1.0) + 2) * epilogue;
    }
  }
}

// The configurations for a problem without an obstacle, best first by estimated cost.
inline std::vector<int64_t> candidates(const Problem& problem) {
  std::vector<int64_t> found(kConfigCount);
  for (int i = 0; i < kConfigCount; ++i) found[i] = i;
  std::stable_sort(found.begin(), found.end(), [&](int64_t a, int64_t b) {
    return cost(problem, kConfigs[a]) < cost(problem, kConfigs[b]);
  });
  return found;
}

} // namespace resfast::hopper
