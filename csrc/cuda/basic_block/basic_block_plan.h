// The residual basic block as one kernel: its parameters, the available tile shapes, the shared
// memory they need, and the choice among them. Plain C++ without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../conv/conv_plan.h"

namespace resfast::basic_block {

using conv::Activation;
using conv::ceil_div;

// h = activation(conv(x, weight1) + bias1), y = activation(conv(h, weight2) + bias2 + x): both
// convolutions are 3x3 of stride 1 with padding 1 and have as many filters as channels.
struct Params {
  const void* x;            // [N, H, W, C], contiguous
  const void* weight[2];    // [C, 3, 3, C], contiguous
  const float* bias[2];     // [C] or null
  void* out;                // like x
  int batch, height, width; // N, H, W
  int channels;             // C, a multiple of 16
  int images;               // per cluster of blocks
  Activation activation;    // kRelu or kLeakyRelu
  float negative_slope;     // of leaky ReLU
};

constexpr int kStageValues = 64; // values of the reduction per stage of weights, a row of 128 bytes

// Tile of one thread block: kM pixels by kN filters at a time, of which each warp computes kWarpM
// by kWarpN. A block holds as many whole images as fit in kM pixels, or one larger image.
template <int M, int N, int WarpM, int WarpN, int Stages>
struct Tile {
  static constexpr int kM = M, kN = N, kWarpM = WarpM, kWarpN = WarpN, kStages = Stages;
  static constexpr int kWarpsN = N / WarpN;
  static constexpr int kThreads = 32 * (M / WarpM) * kWarpsN;
  static constexpr int kStageBytes = N * kStageValues * 2;
};

struct TileShape {
  int m, n, warp_m, warp_n, stages, threads;
};

// Every tile shape: (index, type).
#define RESFAST_BLOCK_TILES(X)        \
  X(0, (Tile<256, 64, 64, 32, 4>))    \
  X(1, (Tile<128, 128, 64, 32, 4>))   \
  X(2, (Tile<128, 64, 32, 32, 4>))    \
  X(3, (Tile<64, 128, 32, 32, 4>))    \
  X(4, (Tile<64, 64, 32, 16, 3>))     \
  X(5, (Tile<64, 32, 16, 16, 4>))     \
  X(6, (Tile<16, 128, 16, 16, 4>))    \
  X(7, (Tile<16, 32, 16, 16, 6>))     \
  X(8, (Tile<256, 32, 32, 32, 4>))
#define RESFAST_BLOCK_STRIP(...) __VA_ARGS__

template <int kIndex>
struct TileAt;
#define RESFAST_BLOCK_TILE_AT(index, tile) \
  template <>                              \
  struct TileAt<index> {                   \
    using Type = RESFAST_BLOCK_STRIP tile; \
  };
RESFAST_BLOCK_TILES(RESFAST_BLOCK_TILE_AT)
#undef RESFAST_BLOCK_TILE_AT

inline constexpr TileShape kTileShapes[] = {
#define RESFAST_BLOCK_SHAPE(index, tile)                                                       \
  {TileAt<index>::Type::kM,     TileAt<index>::Type::kN,      TileAt<index>::Type::kWarpM,     \
   TileAt<index>::Type::kWarpN, TileAt<index>::Type::kStages, TileAt<index>::Type::kThreads},
    RESFAST_BLOCK_TILES(RESFAST_BLOCK_SHAPE)
#undef RESFAST_BLOCK_SHAPE
};
inline constexpr int kTileCount = sizeof(kTileShapes) / sizeof(TileShape);

// Shared memory of a block, as byte offsets: zeros (2 C + 96 bytes: a pixel outside the image,
// readable from any of 8 bank groups), the stages of weights, x, and h. A pixel of a map is a row
// of `pitch` bytes, an odd number of 16-byte vectors, so that 8 consecutive rows start in different
// bank groups.
struct Layout {
  int pitch, stages, x, h, total;

  constexpr Layout(int channels, int rows, int stages_bytes)
      : pitch(2 * channels + 16),
        stages((2 * channels + 96 + 127) / 128 * 128),
        x(stages + stages_bytes),
        h(x + rows * pitch),
        total(h + rows * pitch) {}
};

struct Problem {
  int batch, height, width, channels;

  int64_t pixels() const { return int64_t{height} * width; } // per image
};

// Properties of a GPU.
struct Gpu {
  int multiprocessors;
  int shared_bytes; // maximum per block
  int most_cluster; // blocks; 1 without clusters
};

// Images per cluster of blocks with this tile; 0 if not even one fits.
inline int images_per_cluster(const Problem& problem, int tile, int shared_bytes) {
  const TileShape& shape = kTileShapes[tile];
  const int64_t pixels = problem.pixels();
  if (problem.batch < 1 || pixels < 1 || pixels > shared_bytes || problem.channels > shared_bytes)
    return 0; // before they are multiplied
  const Layout empty(problem.channels, 0, shape.stages * shape.n * kStageValues * 2);
  const int64_t rows = std::max(0, shared_bytes - empty.total) / (2 * empty.pitch);
  const int64_t wanted = std::max<int64_t>(1, shape.m / pixels);
  return static_cast<int>(std::min({wanted, rows / pixels, int64_t{problem.batch}}));
}

// Whether a cluster of that many blocks can split the filters.
inline bool divides(const Problem& problem, int cluster) {
  return problem.channels % (16 * cluster) == 0;
}

struct Candidate {
  int tile, cluster;
  double cycles; // by the model
};

// The candidates worth measuring, best first by a simple model.
//
// A block of M pixels does 2 * 9 * C * C * M / cluster multiply-adds and reads 2 * 9 * C * C * 2 /
// cluster bytes of weights through L2, regardless of M: M multiply-adds per 2 bytes. At 1024
// multiply-adds and 32 bytes per cycle and multiprocessor, M below 64 waits for the weights.
// Compared with two launches, each pixel is read once instead of 9 times, h never leaves the chip
// and one launch is saved; but two launches spread the filters over all multiprocessors, this
// kernel only over those of a cluster. So it can win with small maps and few channels, and lose
// with few images of many channels. Candidates with more than twice the estimated cycles of two
// launches are dropped. The constants were not fitted to measurements.
inline std::vector<Candidate> candidates(const Problem& problem, const Gpu& gpu) {
  constexpr double kMultiplyAdds = 1024, kBytes = 32; // per cycle
  constexpr double kLaunch = 4000;                    // cycles: a launch, the first loads, the end
  constexpr double kPass = 500;                       // the epilogue of kN filters
  constexpr double kBarrier = 400;                    // of a cluster
  std::vector<Candidate> found;
  if (problem.batch < 1 || problem.pixels() < 1 || problem.channels % 16 || problem.channels < 16)
    return found;
  const conv::Problem one{
      problem.batch, problem.height, problem.width, problem.channels, problem.channels, 3, 3, 1, 1,
      1, 1, problem.height, problem.width};
  const auto separate = conv::candidates(one, 2, true, gpu.multiprocessors);
  const double limit = 2 * 2 * (8 * separate.front().cost + kLaunch);

  const int64_t depth_stages = ceil_div(9 * int64_t{problem.channels}, kStageValues);
  for (int tile = 0; tile < kTileCount; ++tile) {
    const TileShape& shape = kTileShapes[tile];
    const int images = images_per_cluster(problem, tile, gpu.shared_bytes);
    if (images == 0) continue;
    for (int cluster = 1; cluster <= gpu.most_cluster; cluster *= 2) {
      if (!divides(problem, cluster)) continue;
      const int64_t filters = problem.channels / cluster;
      // Filters of a tile beyond those of the block are wasted work.
      if (cluster > 1 && shape.n >= 2 * filters && shape.n > 32) continue;
      const int64_t passes =
          ceil_div(filters, shape.n) * ceil_div(images * problem.pixels(), shape.m);
      const double loads = 16.0 / shape.warp_m + 16.0 / shape.warp_n; // ldmatrix per mma
      const double multiply =
          double{1} * shape.m * shape.n * kStageValues / kMultiplyAdds * (0.6 + loads);
      const double weights = shape.n * kStageValues * 2 / kBytes;
      const double pass = static_cast<double>(depth_stages) * std::max(multiply, weights) + kPass;
      const int64_t blocks = ceil_div(problem.batch, images) * cluster;
      const int64_t rounds = ceil_div(blocks, gpu.multiprocessors);
      const double cycles = kLaunch + (cluster > 1 ? 2 * kBarrier : 0) +
                            static_cast<double>(rounds) * 2 * static_cast<double>(passes) * pass;
      if (cycles <= limit) found.push_back({tile, cluster, cycles});
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    return a.cycles < b.cycles;
  });
  return found;
}

} // namespace resfast::basic_block
