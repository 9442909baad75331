// The parameters of a convolution kernel, the available tile shapes, and the choice among them.
// Plain C++ without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace resfast::conv {

enum class Activation : int { kNone, kRelu, kLeakyRelu, kSilu, kGelu };

// Division of 31-bit numbers by multiplication with the reciprocal (Granlund and Montgomery,
// "Division by Invariant Integers using Multiplication", 1994).
struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while (shift < 31 && (uint32_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
};

// y[m, k] = activation(sum over r, s, c of x[n, p * stride - padding + r, ..., c] * w[k, r, s, c]
//                      + bias[k] + residual[m, k]),  m = (n, p, q).
struct Problem {
  int batch, height, width, channels; // x: [N, H, W, C], contiguous
  int filters, kernel_h, kernel_w;    // weight: [K, R, S, C], contiguous
  int stride_h, stride_w, padding_h, padding_w;
  int out_height, out_width;

  int64_t pixels() const { return int64_t{batch} * out_height * out_width; }
  int64_t depth() const { return int64_t{kernel_h} * kernel_w * channels; } // of the reduction
};

// Kernel parameters.
struct Params {
  const void* x;
  const void* weight;
  const float* bias;      // [K] or null
  const void* residual;   // [M, K] or null
  void* out;              // [M, K]
  float* partial;         // [splits, M, partial_pitch]: sums of each split, if there are several
  Problem problem;
  Divider filter_tiles, out_width, out_height;
  int pixels;             // M
  int blocks;             // of the reduction, each one stage of the tile deep
  int blocks_per_split;
  int splits;
  int partial_pitch;      // K rounded up to 8
  Activation activation;
  float negative_slope;   // of leaky ReLU
  bool vector_store;      // rows of out (and residual) are aligned to 16 bytes
};

// Tile of one thread block: kM pixels by kN filters, of which each warp computes kWarpM by kWarpN;
// a stage of the reduction is kVectors * 16 bytes deep.
template <int M, int N, int Vectors, int WarpM, int WarpN, int Stages>
struct Tile {
  static constexpr int kM = M, kN = N, kVectors = Vectors, kWarpM = WarpM, kWarpN = WarpN;
  static constexpr int kStages = Stages;
  static constexpr int kWarpsM = M / WarpM, kWarpsN = N / WarpN;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kStageBytes = (M + N) * Vectors * 16;
  static constexpr int kPitch = WarpN + 8; // of the staged output, in floats: no bank conflicts
  static constexpr int kStagedBytes = kWarpsM * kWarpsN * 16 * kPitch * 4;
  static constexpr int kSharedBytes = std::max(Stages * kStageBytes, kStagedBytes);
};

struct TileShape {
  int m, n, vectors, threads, shared_bytes;
};

// Every tile shape: (index, type). 16-bit types have all of them; for float32, and for channels
// that are not a multiple of 16 bytes, only those of `has_tile` are compiled.
#define RESFAST_CONV_TILES(X)           \
  X(0, (Tile<256, 64, 4, 64, 64, 4>))   \
  X(1, (Tile<128, 128, 4, 64, 64, 4>))  \
  X(2, (Tile<128, 64, 4, 64, 32, 4>))   \
  X(3, (Tile<64, 128, 4, 32, 64, 4>))   \
  X(4, (Tile<64, 64, 8, 32, 32, 3>))    \
  X(5, (Tile<128, 32, 4, 32, 32, 4>))   \
  X(6, (Tile<32, 64, 8, 16, 32, 4>))    \
  X(7, (Tile<16, 64, 8, 16, 16, 4>))
#define RESFAST_STRIP(...) __VA_ARGS__

template <int kIndex>
struct TileAt;
#define RESFAST_TILE_AT(index, tile) \
  template <>                        \
  struct TileAt<index> {             \
    using Type = RESFAST_STRIP tile; \
  };
RESFAST_CONV_TILES(RESFAST_TILE_AT)
#undef RESFAST_TILE_AT

inline constexpr TileShape kTileShapes[] = {
#define RESFAST_TILE_SHAPE(index, tile)                                   \
  {TileAt<index>::Type::kM, TileAt<index>::Type::kN,                      \
   TileAt<index>::Type::kVectors, TileAt<index>::Type::kThreads,          \
   TileAt<index>::Type::kSharedBytes},
    RESFAST_CONV_TILES(RESFAST_TILE_SHAPE)
#undef RESFAST_TILE_SHAPE
};
inline constexpr int kTileCount = sizeof(kTileShapes) / sizeof(TileShape);

// Whether the kernel is compiled for a tile, for values of 4 or 2 bytes, with or without 16-byte
// loads.
constexpr bool has_tile(int tile, int value_bytes, bool aligned) {
  if (tile < 0 || tile >= kTileCount) return false;
  if (!aligned) return tile == 2 || tile == 4;
  return value_bytes == 2 || tile == 2 || tile == 4 || tile == 6;
}

// Instead of a tile: apply only bias, residual and activation to `out`.
inline constexpr int kEpilogueOnly = -1;

struct Candidate {
  int tile, splits;
  double cost; // in arbitrary units
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Number of blocks of the reduction with this tile.
inline int64_t depth_blocks(const Problem& problem, int tile, int value_bytes) {
  return ceil_div(problem.depth() * value_bytes, kTileShapes[tile].vectors * 16);
}

// All candidates, cheapest first by a simple model: the time of one block times the number of
// rounds that the multiprocessors need for all blocks. An autotuner measures the first few of this
// list.
//
// The unit is 8 cycles, in which a multiprocessor is assumed to do 8192 multiply-adds of 16-bit
// values. The other constants are also estimates; none was fitted to measurements.
inline std::vector<Candidate> candidates(
    const Problem& problem, int value_bytes, bool aligned, int multiprocessors) {
  constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};
  constexpr int64_t kSharedPerProcessor = 160 * 1024;
  constexpr double kStart = 6;           // of a block, per vector of its stages: fills the pipeline
  constexpr double kSecondKernel = 192;  // its launch
  constexpr double kPartial = 3e-4;      // to write and read a partial sum
  std::vector<Candidate> found;
  for (int tile = 0; tile < kTileCount; ++tile) {
    if (!has_tile(tile, value_bytes, aligned)) continue;
    const TileShape& shape = kTileShapes[tile];
    const int64_t blocks = depth_blocks(problem, tile, value_bytes);
    const int64_t tiles =
        ceil_div(problem.pixels(), shape.m) * ceil_div(problem.filters, shape.n);
    // Values loaded per value computed: small tiles are limited by shared memory.
    const double loads = 16.0 / shape.m + 16.0 / shape.n;
    const double work = shape.m * shape.n * (1 + loads) * shape.vectors / 1024;
    const int64_t resident = std::max<int64_t>(
        1, std::min<int64_t>(
               kSharedPerProcessor / shape.shared_bytes, shape.m * shape.n >= 128 * 128 ? 2 : 4));
    for (const int splits : kSplits) {
      if (splits > 1 && blocks < 2 * splits) break;
      const int64_t per_split = ceil_div(blocks, splits);
      if (ceil_div(blocks, per_split) != splits) continue; // one would be empty
      const int64_t rounds = ceil_div(tiles * splits, multiprocessors);
      const double overlap = static_cast<double>(std::min(rounds, resident)); // hides latency
      double cost = static_cast<double>(rounds) *
                    (static_cast<double>(per_split) * work + kStart * shape.vectors) *
                    (0.7 + 0.6 / overlap);
      if (splits > 1)
        cost += kSecondKernel + kPartial * splits * static_cast<double>(problem.pixels()) *
                                    problem.filters;
      found.push_back({tile, splits, cost});
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    return a.cost < b.cost;
  });
  return found;
}

// The parameters of a launch without the pointers. `splits` is reduced if one would be empty.
inline Params make_params(
    const Problem& problem, int tile, int splits, int value_bytes, Activation activation,
    float negative_slope, bool vector_store) {
  Params params{};
  params.problem = problem;
  params.pixels = static_cast<int>(problem.pixels());
  params.partial_pitch = static_cast<int>(ceil_div(problem.filters, 8) * 8);
  params.activation = activation;
  params.negative_slope = negative_slope;
  params.vector_store = vector_store;
  if (tile == kEpilogueOnly) return params;
  params.blocks = static_cast<int>(depth_blocks(problem, tile, value_bytes));
  params.blocks_per_split = static_cast<int>(ceil_div(params.blocks, splits));
  params.splits = static_cast<int>(ceil_div(params.blocks, params.blocks_per_split));
  params.filter_tiles =
      Divider(static_cast<uint32_t>(ceil_div(problem.filters, kTileShapes[tile].n)));
  params.out_width = Divider(static_cast<uint32_t>(problem.out_width));
  params.out_height = Divider(static_cast<uint32_t>(problem.out_height));
  return params;
}

} // namespace resfast::conv
