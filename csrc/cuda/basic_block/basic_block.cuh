// The residual basic block in one kernel, on tensor cores (sm_80 and newer), NHWC:
//
//   h = activation(conv(x, weight1) + bias1),  y = activation(conv(h, weight2) + bias2 + x).
//
// A thread block holds a few whole images: x and h stay in its shared memory, and both convolutions
// are implicit GEMMs that read pixels from there; each position of the window reads the same rows
// at a constant offset. Only weights stream through the pipeline of asynchronous copies, without a
// break from the first filters of conv1 to the last of conv2. h is rounded as by two launches. y
// overwrites x, value by value, before it is stored.
//
// The blocks of a cluster hold the same images and split the filters; each writes its part of h to
// all of them.
#pragma once

#include "basic_block_plan.h"
#include "../common/cluster.h"
#include "../conv/conv.cuh"

namespace resfast::basic_block {

using namespace device;

constexpr int kVector = 8;                              // values per 16 bytes
constexpr int kStageVectors = kStageValues / kVector;   // per filter
constexpr int kSteps = kStageValues / 16;               // mma steps

// One thread's share of the weight copies: the vector `thread % 8` of every kRowsPerPass-th filter,
// stage by stage through the reduction, then the filters of the block, then every tile of pixels,
// then both weights.
template <class Tile>
struct WeightLoader {
  static constexpr int kRowsPerPass = Tile::kThreads / kStageVectors;
  static constexpr int kRows = Tile::kN / kRowsPerPass;
  static_assert(Tile::kN % kRowsPerPass == 0 && kRowsPerPass % 8 == 0);

  const Params& params;
  const int depth;          // of the reduction, in values
  const int first, end;     // filters of the block
  const int m_tiles;        // tiles of pixels
  int conv = 0, m_tile = 0, filter, position;
  int target;               // bytes into the stage

  RESFAST_DEVICE WeightLoader(const Params& given, int first_filter, int end_filter, int tiles)
      : params(given), depth(9 * given.channels), first(first_filter), end(end_filter),
        m_tiles(tiles) {
    const int row = thread_index() / kStageVectors, vector = thread_index() % kStageVectors;
    target = (row * kStageVectors + conv::swizzle<kStageVectors>(row, vector)) * 16;
    filter = first + row;
    position = vector * kVector;
  }

  // Starts the copies of the next stage into `stage`.
  RESFAST_DEVICE void load(Shared stage) {
    const uint16_t* weight = static_cast<const uint16_t*>(params.weight[conv]);
    RESFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = filter + i * kRowsPerPass;
      const bool use = row < end && position < depth;
      const int64_t offset = use ? static_cast<int64_t>(row) * depth + position : 0;
      copy_async(stage + target + i * kRowsPerPass * kStageVectors * 16, weight + offset, use);
    }
    const int vector = thread_index() % kStageVectors * kVector;
    position += kStageValues;
    if (position - vector < depth) return;
    position = vector;
    filter += Tile::kN;
    const int row = thread_index() / kStageVectors;
    if (filter - row < end) return;
    filter = first + row;
    if (++m_tile < m_tiles) return;
    m_tile = 0;
    conv = 1;
  }
};

// The rows of a map that one lane passes to ldmatrix, shifted by one position of the window.
template <class Tile>
struct PixelReader {
  static constexpr int kRows = Tile::kWarpM / 16;

  const Params& params;
  const Shared shared;
  const int pitch;
  int first[kRows];    // byte offset of the lane's half of the first step in the row of pixel i
  int inside[kRows];   // one bit per position of the window: whether it is in the image
  Shared row[kRows];   // current addresses
  int tap, column;     // position of the window; bytes into the row

  RESFAST_DEVICE PixelReader(
      const Params& given, Shared memory, int pitch_, int map, int first_m, int rows)
      : params(given), shared(memory), pitch(pitch_) {
    const int lane = thread_index() % 32;
    RESFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int m = first_m + 16 * i + lane % 16;
      const int line = m / params.width, q = m - line * params.width;
      const int p = line % params.height;
      first[i] = map + m * pitch + lane / 16 * 16;
      inside[i] = 0;
      RESFAST_UNROLL
      for (int t = 0; t < 9; ++t) {
        const int p_ = p + t / 3 - 1, q_ = q + t % 3 - 1;
        const bool in = m < rows && p_ >= 0 && p_ < params.height && q_ >= 0 && q_ < params.width;
        inside[i] |= in ? 1 << t : 0;
      }
    }
  }

  // Moves to a position of the window; positions beyond the last one read zeros.
  RESFAST_DEVICE void move_to(int to) {
    tap = to;
    column = 0;
    const int moved = ((tap / 3 - 1) * params.width + tap % 3 - 1) * pitch;
    RESFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int at = first[i] + moved;
      // Zeros in the same bank group as the value they replace.
      row[i] = shared + (inside[i] >> tap & 1 ? at : at & 0x70);
    }
  }

  RESFAST_DEVICE void advance(int bytes) {
    column += bytes;
    if (column == 2 * params.channels) move_to(tap + 1);
  }
};

// Adds the products of one stage of weights. With `kWhole` a position of the window ends only at
// the end of a stage, otherwise at any step.
template <class Type, class Tile, bool kWhole>
RESFAST_DEVICE void multiply_stage(
    float (&sums)[Tile::kWarpM / 16][Tile::kWarpN / 8][4], PixelReader<Tile>& pixels, Shared stage,
    int warp_n) {
  constexpr int kRows = Tile::kWarpM / 16, kColumns = Tile::kWarpN / 8;
  static_assert(kColumns % 2 == 0);
  // Both vectors of filters 0-7, then both of 8-15.
  const int lane = thread_index() % 32;
  const int row_b = lane % 8 + lane / 16 * 8, vector_b = lane / 8 % 2;
  const Shared from_b = stage + (warp_n + row_b) * kStageVectors * 16;
  RESFAST_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kRows][4], b[kColumns][2];
    const int at_b = conv::swizzle<kStageVectors>(row_b, 2 * step + vector_b) * 16;
    RESFAST_UNROLL
    for (int i = 0; i < kRows; ++i)
      load_matrices(a[i], pixels.row[i] + pixels.column + (kWhole ? step * 32 : 0));
    RESFAST_UNROLL
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t pair[4];
      load_matrices(pair, from_b + j * 8 * kStageVectors * 16 + at_b);
      b[j][0] = pair[0];
      b[j][1] = pair[1];
      b[j + 1][0] = pair[2];
      b[j + 1][1] = pair[3];
    }
    RESFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RESFAST_UNROLL
      for (int j = 0; j < kColumns; ++j) Type::mma(sums[i][j], a[i], b[j]);
    }
    if constexpr (!kWhole) pixels.advance(32);
  }
  if constexpr (kWhole) pixels.advance(kSteps * 32);
}

RESFAST_DEVICE float activate(float value, const Params& params) { // keeps NaN
  if (!(value < 0)) return value;
  return params.activation == Activation::kRelu ? 0.f : params.negative_slope * value;
}

// Adds the bias (and x, for conv2) to a warp's sums, applies the activation and writes the result
// to shared memory: pairs of values, rows in different bank groups.
template <class Type, class Tile>
RESFAST_DEVICE void finish(
    const Params& params, int conv, const float (&sums)[Tile::kWarpM / 16][Tile::kWarpN / 8][4],
    char* map, int pitch, int first_m, int rows, int first_n, int end) {
  const int lane = thread_index() % 32;
  const float* bias = params.bias[conv];
  RESFAST_UNROLL
  for (int j = 0; j < Tile::kWarpN / 8; ++j) {
    const int n = first_n + 8 * j + lane % 4 * 2;
    if (n >= end) continue;
    const float added[2] = {bias ? bias[n] : 0.f, bias ? bias[n + 1] : 0.f};
    RESFAST_UNROLL
    for (int i = 0; i < Tile::kWarpM / 16; ++i) {
      RESFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int m = first_m + 16 * i + 8 * half + lane / 4;
        if (m >= rows) continue;
        uint32_t* place = reinterpret_cast<uint32_t*>(map + m * pitch + 2 * n);
        const uint32_t x = conv == 1 ? *place : 0;
        uint32_t pair = 0;
        RESFAST_UNROLL
        for (int e = 0; e < 2; ++e) {
          float value = sums[i][j][2 * half + e] + added[e];
          if (conv == 1) value += Type::to_float(static_cast<uint16_t>(x >> 16 * e));
          pair |= uint32_t{Type::from_float(activate(value, params))} << 16 * e;
        }
        *place = pair;
      }
    }
  }
}

template <class Type, class Tile, bool kWhole>
RESFAST_DEVICE void run_block_of_images(const Params& params) {
  const int ranks = cluster_size(), rank = cluster_rank();
  const int per_image = params.height * params.width;
  const int first_image = static_cast<int>(block_x()) / ranks * params.images;
  const int rest = params.batch - first_image;
  const int rows = (rest < params.images ? rest : params.images) * per_image;
  const int filters = params.channels / ranks, first_filter = rank * filters;
  const int end = first_filter + filters;
  const Layout layout(
      params.channels, params.images * per_image, Tile::kStages * Tile::kStageBytes);
  char* memory = shared_memory();
  const Shared shared = shared_address(memory);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int warp_m = warp / Tile::kWarpsN * Tile::kWarpM;
  const int warp_n = warp % Tile::kWarpsN * Tile::kWarpN;

  for (int i = thread_index() * 16; i < layout.stages; i += Tile::kThreads * 16)
    store_shared(shared + i, {0, 0, 0, 0});
  const int64_t start = static_cast<int64_t>(first_image) * per_image * params.channels;
  const uint16_t* x = static_cast<const uint16_t*>(params.x) + start;
  uint16_t* out = static_cast<uint16_t*>(params.out) + start;
  const int row_vectors = params.channels / kVector;
  for (int i = thread_index(); i < rows * row_vectors; i += Tile::kThreads) {
    const int m = i / row_vectors;
    const int to = layout.x + m * layout.pitch + (i - m * row_vectors) * 16;
    copy_async(shared + to, x + static_cast<int64_t>(i) * kVector, true);
  }

  const int depth_stages = (9 * params.channels + kStageValues - 1) / kStageValues;
  const int passes = (filters + Tile::kN - 1) / Tile::kN;
  const int m_tiles = (params.images * per_image + Tile::kM - 1) / Tile::kM;
  int to_load = 2 * m_tiles * passes * depth_stages;
  WeightLoader<Tile> loader(params, first_filter, end, m_tiles);
  auto load = [&](int stage) {
    if (to_load > 0) loader.load(shared + layout.stages + stage * Tile::kStageBytes);
    --to_load;
    commit_copies();
  };
  RESFAST_UNROLL
  for (int i = 0; i < Tile::kStages - 1; ++i) load(i); // the first group also copies x
  if (ranks > 1) sync_cluster(); // all blocks are running, so they can be written to

  int read = 0, write = Tile::kStages - 1;
  for (int part = 0; part < 2 * m_tiles; ++part) {
    const int conv = part >= m_tiles;
    const int first_m = (part - conv * m_tiles) * Tile::kM + warp_m;
    if (part == m_tiles && ranks > 1) sync_cluster(); // h is complete
    PixelReader<Tile> pixels(
        params, shared, layout.pitch, conv ? layout.h : layout.x, first_m, rows);
    for (int pass = 0; pass < passes; ++pass) {
      float sums[Tile::kWarpM / 16][Tile::kWarpN / 8][4] = {};
      pixels.move_to(0);
      for (int stage = 0; stage < depth_stages; ++stage) {
        wait_copies<Tile::kStages - 2>();
        sync_threads(); // this stage (and x or h) has arrived; no thread still reads the next one
        load(write);
        multiply_stage<Type, Tile, kWhole>(
            sums, pixels, shared + layout.stages + read * Tile::kStageBytes, warp_n);
        read = read + 1 == Tile::kStages ? 0 : read + 1;
        write = write + 1 == Tile::kStages ? 0 : write + 1;
      }
      const int place = conv ? layout.x : layout.h;
      const int first_n = first_filter + pass * Tile::kN + warp_n;
      finish<Type, Tile>(
          params, conv, sums, memory + place, layout.pitch, first_m, rows, first_n, end);
      if (!conv && ranks == 1) continue;
      // Stores vectors: h to the other blocks, y to global memory.
      sync_warp();
      constexpr int kPerRow = Tile::kWarpN / kVector;
      for (int i = lane; i < Tile::kWarpM * kPerRow; i += 32) {
        const int m = first_m + i / kPerRow, n = first_n + i % kPerRow * kVector;
        if (m >= rows || n >= end) continue;
        const int at = place + m * layout.pitch + 2 * n;
        const uint4 vector = *reinterpret_cast<const uint4*>(memory + at);
        if (conv) {
          *reinterpret_cast<uint4*>(out + static_cast<int64_t>(m) * params.channels + n) = vector;
        } else {
          for (int other = 0; other < ranks; ++other)
            if (other != rank) store_cluster(shared + at, other, vector);
        }
      }
    }
  }
  wait_copies<0>();
}

template <class Type, class Tile>
RESFAST_DEVICE void basic_block(const Params& params) {
  if (params.channels % kStageValues == 0)
    run_block_of_images<Type, Tile, true>(params);
  else
    run_block_of_images<Type, Tile, false>(params);
}

} // namespace resfast::basic_block
