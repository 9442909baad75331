// Convolution forward as an implicit GEMM on tensor cores (sm_80 and newer), NHWC, with bias,
// residual and activation in its epilogue.
//
// M: output pixels (n, p, q); N: filters k; the reduction runs over (r, s, c), in memory order of
// the weights, in vectors of 16 bytes. A stage in shared memory holds kM + kN rows of kVectors
// vectors each, swizzled so that neither the copies nor ldmatrix have bank conflicts. One ldmatrix
// step is 2 vectors: 16 values of 2 bytes or 8 of 4, in the same fragment layout.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "conv_plan.h"
#include "../common/device.h"

namespace resfast::conv {

using namespace device;

// -- value types ---------------------------------------------------------------------------------

struct Bf16 {
  using Value = uint16_t;
  static constexpr bool kTwoParts = false;
  static RESFAST_DEVICE float to_float(Value value) { return bf16_to_float(value); }
  static RESFAST_DEVICE Value from_float(float value) { return float_to_bf16(value); }
  static RESFAST_DEVICE void mma(float (&sum)[4], uint32_t (&a)[4], uint32_t (&b)[2]) {
    mma_bf16(sum, a, b);
  }
};

struct Fp16 {
  using Value = uint16_t;
  static constexpr bool kTwoParts = false;
  static RESFAST_DEVICE float to_float(Value value) { return fp16_to_float(value); }
  static RESFAST_DEVICE Value from_float(float value) { return float_to_fp16(value); }
  static RESFAST_DEVICE void mma(float (&sum)[4], uint32_t (&a)[4], uint32_t (&b)[2]) {
    mma_fp16(sum, a, b);
  }
};

// float32 on TF32 tensor cores: rounded to 10 bits of mantissa or, for float32 accuracy, as a sum
// of two such parts, of whose products all but the smallest are added.
template <bool kExact>
struct Float {
  using Value = float;
  static constexpr bool kTwoParts = kExact;
  static RESFAST_DEVICE float to_float(Value value) { return value; }
  static RESFAST_DEVICE Value from_float(float value) { return value; }
  static RESFAST_DEVICE void mma(float (&sum)[4], uint32_t (&a)[4], uint32_t (&b)[2]) {
    mma_tf32(sum, a, b);
  }
};
using Fp32 = Float<true>;
using Tf32 = Float<false>;

// -- helpers -------------------------------------------------------------------------------------

RESFAST_DEVICE int divide(int value, const Divider& by) {
  const uint32_t n = static_cast<uint32_t>(value);
  return static_cast<int>((multiply_high(n, by.factor) + n) >> by.shift);
}

// Swizzled position of a vector in its row: in 8 rows, the same vector is in 8 different bank
// groups.
template <int kVectors>
RESFAST_DEVICE int swizzle(int row, int vector) {
  static_assert(kVectors == 4 || kVectors == 8);
  return vector ^ ((row / (8 / kVectors)) & (kVectors - 1));
}

RESFAST_DEVICE float activate(float value, const Params& params) {
  switch (params.activation) { // keeps NaN
    case Activation::kRelu: return value < 0 ? 0.f : value;
    case Activation::kLeakyRelu: return value < 0 ? params.negative_slope * value : value;
    case Activation::kSilu: return value / (1 + expf(-value));
    case Activation::kGelu: return 0.5f * value * (1 + erff(value * 0.70710678f)); // sqrt(1/2)
    default: return value;
  }
}

// A float as its TF32 value and the remainder as another.
RESFAST_DEVICE void split_float(uint32_t& bits, uint32_t& rest) {
  const float value = float_of(bits);
  bits = round_to_tf32(value);
  rest = round_to_tf32(value - float_of(bits));
}

// -- loads ---------------------------------------------------------------------------------------

// One thread's share of the copies of a stage: the vector `thread % kVectors` of every
// kRowsPerPass-th row of pixels and of filters. The position (r, s, c) of that vector is the same
// in all its rows and is updated from stage to stage.
template <class Type, class Tile, bool kAligned>
struct Loader {
  using Value = typename Type::Value;
  static constexpr int kVector = 16 / sizeof(Value);
  static constexpr int kUnit = kAligned ? kVector : 1; // channels per unit
  static constexpr int kStep = Tile::kVectors * kVector / kUnit;
  static constexpr int kRowsPerPass = Tile::kThreads / Tile::kVectors;
  static constexpr int kPassBytes = kRowsPerPass * Tile::kVectors * 16;
  static constexpr int kPixelRows = Tile::kM / kRowsPerPass;
  static constexpr int kFilterRows = Tile::kN / kRowsPerPass;
  static constexpr int kNowhere = -(1 << 30);
  static_assert(Tile::kM % kRowsPerPass == 0 && Tile::kN % kRowsPerPass == 0);
  static_assert(kRowsPerPass % 8 == 0, "the swizzle is that of the first row");
  using Offset = std::conditional_t<kAligned, int32_t, int64_t>; // in units

  const Params& params;
  const int channels;        // units per pixel
  int c, s, r;               // position of the vector
  int top[kPixelRows];       // of each pixel's window, or kNowhere
  int left[kPixelRows];
  Offset pixel[kPixelRows];  // of the window's first value, which may be outside the image
  int first_filter;
  Offset filter;             // of the vector in the first filter
  int target;                // bytes into the stage

  RESFAST_DEVICE Loader(const Params& given, int first_m, int first_n, int first_block)
      : params(given), channels(given.problem.channels / kUnit) {
    const Problem& in = params.problem;
    const int row = thread_index() / Tile::kVectors, vector = thread_index() % Tile::kVectors;
    target = (row * Tile::kVectors + swizzle<Tile::kVectors>(row, vector)) * 16;

    const int position = first_block * kStep + vector * (kVector / kUnit);
    const int window = position / channels;
    c = position - window * channels;
    r = window / in.kernel_w;
    s = window - r * in.kernel_w;

    RESFAST_UNROLL
    for (int i = 0; i < kPixelRows; ++i) {
      const int m = first_m + row + i * kRowsPerPass;
      const int line = divide(m, params.out_width);
      const int n = divide(line, params.out_height);
      const int q = m - line * in.out_width, p = line - n * in.out_height;
      const bool valid = m < params.pixels;
      top[i] = valid ? p * in.stride_h - in.padding_h : kNowhere;
      left[i] = q * in.stride_w - in.padding_w;
      pixel[i] = valid ? ((static_cast<Offset>(n) * in.height + top[i]) * in.width + left[i]) *
                             channels
                       : 0;
    }
    first_filter = first_n + row;
    filter = static_cast<Offset>(first_filter) * depth() + position;
  }

  RESFAST_DEVICE int depth() const {
    return params.problem.kernel_h * params.problem.kernel_w * channels;
  }

  RESFAST_DEVICE bool inside(int i, int r_, int s_) const {
    return static_cast<unsigned>(top[i] + r_) < static_cast<unsigned>(params.problem.height) &&
           static_cast<unsigned>(left[i] + s_) < static_cast<unsigned>(params.problem.width);
  }

  // Starts the copies of the next stage of the reduction into `stage`.
  RESFAST_DEVICE void load(Shared stage) {
    const Value* x = static_cast<const Value*>(params.x);
    const Value* weight = static_cast<const Value*>(params.weight);
    const Shared to = stage + target;
    const int filters = params.problem.filters;
    const bool valid = r < params.problem.kernel_h;
    if constexpr (kAligned) {
      const Offset tap = (static_cast<Offset>(r) * params.problem.width + s) * channels + c;
      RESFAST_UNROLL
      for (int i = 0; i < kPixelRows; ++i) {
        const bool use = valid && inside(i, r, s);
        const Value* from = x + (use ? static_cast<int64_t>(pixel[i] + tap) * kVector : 0);
        copy_async(to + i * kPassBytes, from, use);
      }
      RESFAST_UNROLL
      for (int i = 0; i < kFilterRows; ++i) {
        const bool use = valid && first_filter + i * kRowsPerPass < filters;
        const Offset offset = filter + i * kRowsPerPass * depth();
        const Value* from = weight + (use ? static_cast<int64_t>(offset) * kVector : 0);
        copy_async(to + (kPixelRows + i) * kPassBytes, from, use);
      }
    } else {
      RESFAST_UNROLL
      for (int i = 0; i < kPixelRows; ++i) {
        Value values[kVector];
        int c_ = c, s_ = s, r_ = r;
        RESFAST_UNROLL
        for (int e = 0; e < kVector; ++e) {
          const bool use = r_ < params.problem.kernel_h && inside(i, r_, s_);
          const Offset tap = (static_cast<Offset>(r_) * params.problem.width + s_) * channels + c_;
          values[e] = use ? x[pixel[i] + tap] : Value{0};
          if (++c_ == channels) {
            c_ = 0;
            if (++s_ == params.problem.kernel_w) {
              s_ = 0;
              ++r_;
            }
          }
        }
        store_values(to + i * kPassBytes, values);
      }
      const int position = (r * params.problem.kernel_w + s) * channels + c;
      RESFAST_UNROLL
      for (int i = 0; i < kFilterRows; ++i) {
        Value values[kVector];
        const Offset offset = filter + static_cast<Offset>(i) * kRowsPerPass * depth();
        RESFAST_UNROLL
        for (int e = 0; e < kVector; ++e) {
          const bool use = position + e < depth() && first_filter + i * kRowsPerPass < filters;
          values[e] = use ? weight[offset + e] : Value{0};
        }
        store_values(to + (kPixelRows + i) * kPassBytes, values);
      }
    }
    filter += kStep;
    c += kStep;
    while (c >= channels) {
      c -= channels;
      if (++s == params.problem.kernel_w) {
        s = 0;
        ++r;
      }
    }
  }

  static RESFAST_DEVICE void store_values(Shared to, const Value (&values)[kVector]) {
    uint4 vector;
    memcpy(&vector, values, 16);
    store_shared(to, vector);
  }
};

// -- epilogue ------------------------------------------------------------------------------------

// Bias of kVector consecutive filters; zeros without a bias.
template <int kVector>
RESFAST_DEVICE void load_bias(const Params& params, int n, float (&bias)[kVector]) {
  RESFAST_UNROLL
  for (int e = 0; e < kVector; ++e)
    bias[e] = params.bias && n + e < params.problem.filters ? params.bias[n + e] : 0.f;
}

// Residual of kVector consecutive filters of one pixel, if it can be loaded as one vector.
template <class Type>
RESFAST_DEVICE uint4 load_residual(const Params& params, int m, int n) {
  if (!params.residual || !params.vector_store || m >= params.pixels ||
      n >= params.problem.filters)
    return {};
  const int64_t offset = static_cast<int64_t>(m) * params.problem.filters + n;
  return *reinterpret_cast<const uint4*>(
      static_cast<const typename Type::Value*>(params.residual) + offset);
}

// Values of `out` for kVector consecutive filters of one pixel.
template <class Type, int kVector>
RESFAST_DEVICE void load_out(const Params& params, int m, int n, float (&sums)[kVector]) {
  using Value = typename Type::Value;
  const int64_t offset = static_cast<int64_t>(m) * params.problem.filters + n;
  const Value* out = static_cast<const Value*>(params.out) + offset;
  Value values[kVector] = {};
  if (params.vector_store) {
    const uint4 vector = *reinterpret_cast<const uint4*>(out);
    memcpy(values, &vector, 16);
  } else {
    RESFAST_UNROLL
    for (int e = 0; e < kVector; ++e)
      if (n + e < params.problem.filters) values[e] = out[e];
  }
  RESFAST_UNROLL
  for (int e = 0; e < kVector; ++e) sums[e] = Type::to_float(values[e]);
}

// Applies the epilogue to kVector consecutive filters of one pixel and stores them.
template <class Type, int kVector>
RESFAST_DEVICE void finish(
    const Params& params, int m, int n, const float (&sums)[kVector], const float (&bias)[kVector],
    const uint4& residual_vector) {
  using Value = typename Type::Value;
  static_assert(kVector * sizeof(Value) == 16);
  const int64_t offset = static_cast<int64_t>(m) * params.problem.filters + n;
  const Value* residual = static_cast<const Value*>(params.residual);
  Value* out = static_cast<Value*>(params.out) + offset;
  Value values[kVector];
  if (params.vector_store) {
    memcpy(values, &residual_vector, 16);
    RESFAST_UNROLL
    for (int e = 0; e < kVector; ++e) {
      float value = sums[e] + bias[e];
      if (residual) value += Type::to_float(values[e]);
      values[e] = Type::from_float(activate(value, params));
    }
    uint4 vector;
    memcpy(&vector, values, 16);
    *reinterpret_cast<uint4*>(out) = vector;
  } else {
    RESFAST_UNROLL
    for (int e = 0; e < kVector; ++e) {
      if (n + e >= params.problem.filters) continue;
      float value = sums[e] + bias[e];
      if (residual) value += Type::to_float(residual[offset + e]);
      out[e] = Type::from_float(activate(value, params));
    }
  }
}

template <int kCount>
RESFAST_DEVICE void load_floats(float (&values)[kCount], const float* from) {
  RESFAST_UNROLL
  for (int e = 0; e < kCount; e += 4) {
    const uint4 vector = *reinterpret_cast<const uint4*>(from + e);
    memcpy(values + e, &vector, 16);
  }
}

template <int kCount>
RESFAST_DEVICE void store_floats(float* to, const float (&values)[kCount]) {
  RESFAST_UNROLL
  for (int e = 0; e < kCount; e += 4) {
    uint4 vector;
    memcpy(&vector, values + e, 16);
    *reinterpret_cast<uint4*>(to + e) = vector;
  }
}

// Stores the sums of a warp, 16 rows at a time, through shared memory as 16-byte vectors.
template <class Type, class Tile>
RESFAST_DEVICE void store_tile(
    const Params& params, float (&sums)[Tile::kWarpM / 16][Tile::kWarpN / 8][4], char* shared,
    int split, int first_m, int first_n) {
  constexpr int kVector = 16 / sizeof(typename Type::Value);
  constexpr int kPerRow = Tile::kWarpN / kVector; // vectors
  constexpr int kRowsPerPass = 32 / kPerRow, kPasses = 16 / kRowsPerPass;
  static_assert(32 % kPerRow == 0 && 16 % kRowsPerPass == 0);
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int row = lane / kPerRow, column = lane % kPerRow * kVector, n = first_n + column;
  float* staged = reinterpret_cast<float*>(shared) + warp * 16 * Tile::kPitch;
  float bias[kVector];
  load_bias(params, n, bias);
  RESFAST_UNROLL
  for (int i = 0; i < Tile::kWarpM / 16; ++i) {
    const int m = first_m + 16 * i + row;
    uint4 residual[kPasses];
    RESFAST_UNROLL
    for (int pass = 0; pass < kPasses; ++pass)
      residual[pass] = load_residual<Type>(params, m + pass * kRowsPerPass, n);
    RESFAST_UNROLL
    for (int j = 0; j < Tile::kWarpN / 8; ++j) {
      RESFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        float* to = staged + (lane / 4 + 8 * half) * Tile::kPitch + 8 * j + 2 * (lane % 4);
        const uint64_t pair = bits_of(sums[i][j][2 * half]) |
                              static_cast<uint64_t>(bits_of(sums[i][j][2 * half + 1])) << 32;
        memcpy(to, &pair, 8);
      }
    }
    sync_warp();
    RESFAST_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int m_ = m + pass * kRowsPerPass;
      float values[kVector];
      load_floats(values, staged + (row + pass * kRowsPerPass) * Tile::kPitch + column);
      if (m_ >= params.pixels || n >= params.partial_pitch) continue;
      if (params.splits > 1) {
        const int64_t line = static_cast<int64_t>(split) * params.pixels + m_;
        store_floats(params.partial + line * params.partial_pitch + n, values);
      } else if (n < params.problem.filters) {
        finish<Type>(params, m_, n, values, bias, residual[pass]);
      }
    }
    sync_warp();
  }
}

// -- kernels -------------------------------------------------------------------------------------

template <class Type, class Tile>
RESFAST_DEVICE void multiply_stage(
    float (&sums)[Tile::kWarpM / 16][Tile::kWarpN / 8][4], Shared stage, int warp_m, int warp_n) {
  constexpr int kRows = Tile::kWarpM / 16, kColumns = Tile::kWarpN / 8;
  constexpr int kRowBytes = Tile::kVectors * 16;
  static_assert(kColumns % 2 == 0);
  const int lane = thread_index() % 32;
  // Rows 0-7 and 8-15 of the first vector, then of the second; for filters, both vectors of rows
  // 0-7, then of 8-15. All other rows are multiples of 16 away, which do not change the swizzle.
  const int row_a = lane % 16, vector_a = lane / 16;
  const int row_b = lane % 8 + lane / 16 * 8, vector_b = lane / 8 % 2;
  const Shared from_a = stage + (warp_m + row_a) * kRowBytes;
  const Shared from_b = stage + (Tile::kM + warp_n + row_b) * kRowBytes;
  RESFAST_UNROLL
  for (int step = 0; step < Tile::kVectors / 2; ++step) {
    uint32_t a[kRows][4], b[kColumns][2];
    const int at_a = swizzle<Tile::kVectors>(row_a, 2 * step + vector_a) * 16;
    const int at_b = swizzle<Tile::kVectors>(row_b, 2 * step + vector_b) * 16;
    RESFAST_UNROLL
    for (int i = 0; i < kRows; ++i) load_matrices(a[i], from_a + i * 16 * kRowBytes + at_a);
    RESFAST_UNROLL
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t pair[4];
      load_matrices(pair, from_b + j * 8 * kRowBytes + at_b);
      b[j][0] = pair[0];
      b[j][1] = pair[1];
      b[j + 1][0] = pair[2];
      b[j + 1][1] = pair[3];
    }
    if constexpr (std::is_same_v<typename Type::Value, float>) {
      uint32_t a_rest[kRows][4], b_rest[kColumns][2];
      RESFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        RESFAST_UNROLL
        for (int e = 0; e < 4; ++e) split_float(a[i][e], a_rest[i][e]);
      }
      RESFAST_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        RESFAST_UNROLL
        for (int e = 0; e < 2; ++e) split_float(b[j][e], b_rest[j][e]);
      }
      if constexpr (Type::kTwoParts) {
        RESFAST_UNROLL
        for (int i = 0; i < kRows; ++i) {
          RESFAST_UNROLL
          for (int j = 0; j < kColumns; ++j) {
            Type::mma(sums[i][j], a_rest[i], b[j]);
            Type::mma(sums[i][j], a[i], b_rest[j]);
          }
        }
      }
    }
    RESFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      RESFAST_UNROLL
      for (int j = 0; j < kColumns; ++j) Type::mma(sums[i][j], a[i], b[j]);
    }
  }
}

// One tile of the output, or of one split of the reduction.
template <class Type, class Tile, bool kAligned>
RESFAST_DEVICE void convolve(const Params& params) {
  char* memory = shared_memory();
  const Shared shared = shared_address(memory);
  const int tile = static_cast<int>(block_x()), split = static_cast<int>(block_y());
  const int tile_m = divide(tile, params.filter_tiles);
  const int first_m = tile_m * Tile::kM;
  const int first_n = (tile - tile_m * static_cast<int>(params.filter_tiles.divisor)) * Tile::kN;
  const int first_block = split * params.blocks_per_split;
  const int rest = params.blocks - first_block;
  const int blocks = rest < params.blocks_per_split ? rest : params.blocks_per_split;
  const int warp = thread_index() / 32;
  const int warp_m = warp / Tile::kWarpsN * Tile::kWarpM;
  const int warp_n = warp % Tile::kWarpsN * Tile::kWarpN;

  Loader<Type, Tile, kAligned> loader(params, first_m, first_n, first_block);
  RESFAST_UNROLL
  for (int i = 0; i < Tile::kStages - 1; ++i) {
    if (i < blocks) loader.load(shared + i * Tile::kStageBytes);
    commit_copies();
  }

  float sums[Tile::kWarpM / 16][Tile::kWarpN / 8][4] = {};
  int read = 0, write = Tile::kStages - 1;
  for (int block = 0; block < blocks; ++block) {
    wait_copies<Tile::kStages - 2>();
    sync_threads(); // this stage has arrived; no thread still reads the one written next
    if (block + Tile::kStages - 1 < blocks) loader.load(shared + write * Tile::kStageBytes);
    commit_copies();
    multiply_stage<Type, Tile>(sums, shared + read * Tile::kStageBytes, warp_m, warp_n);
    read = read + 1 == Tile::kStages ? 0 : read + 1;
    write = write + 1 == Tile::kStages ? 0 : write + 1;
  }
  wait_copies<0>();
  sync_threads(); // the epilogue reuses the memory of the stages
  store_tile<Type, Tile>(params, sums, memory, split, first_m + warp_m, first_n + warp_n);
}

constexpr int kReduceThreads = 128;

// The second kernel of a split reduction: adds the partial sums, in order, and applies the
// epilogue. Without partial sums (`splits` is 0) it applies the epilogue to `out`.
template <class Type>
RESFAST_DEVICE void reduce(const Params& params) {
  constexpr int kVector = 16 / sizeof(typename Type::Value);
  const int64_t item = static_cast<int64_t>(block_x()) * kReduceThreads + thread_index();
  const int per_row = params.partial_pitch / kVector;
  const int64_t row = item / per_row;
  const int n = static_cast<int>(item - row * per_row) * kVector;
  if (row >= params.pixels || n >= params.problem.filters) return;
  const int m = static_cast<int>(row);
  const float* from = params.partial + row * params.partial_pitch + n;
  float sums[kVector] = {}, bias[kVector];
  load_bias(params, n, bias);
  const uint4 residual = load_residual<Type>(params, m, n);
  if (params.splits == 0) load_out<Type>(params, m, n, sums);
  for (int split = 0; split < params.splits; ++split) {
    float values[kVector];
    load_floats(values, from);
    RESFAST_UNROLL
    for (int e = 0; e < kVector; ++e) sums[e] += values[e];
    from += static_cast<int64_t>(params.pixels) * params.partial_pitch;
  }
  finish<Type>(params, m, n, sums, bias, residual);
}

} // namespace resfast::conv
