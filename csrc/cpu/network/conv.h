// Convolution of maps in lines: 16 pixels times 16 outputs at a time, summed over taps and channels.
//
// Weights: [panel of 16 outputs][block of 32 channels][tap][pair][output][2].
#pragma once

#include <type_traits>

#include "../conv/conv_bf16.h"
#include "kernels.h"

namespace resfast::network {

constexpr int64_t kMostTiles = 4; // multiplied with the same weights
constexpr int64_t kWeights = kTile * kBlock; // of a tap, a block and a panel
constexpr int64_t kSums = kTile * kTile;
constexpr int64_t kAhead = 4096; // values of weights that are fetched before they are multiplied

// What a panel of weights is multiplied with.
struct Operand {
  const uint16_t* from; // of the map
  int64_t block_values; // from one block of channels to the next
  int64_t blocks, tap_count;
  const int32_t* taps; // lines
  const uint16_t* weights;
  int64_t whole; // blocks before those that are not full
  int64_t pairs; // of channels of the latter
};

RESFAST_BF16 inline void multiply_avx512(const Operand& operand, const Tile& tile, float* sums) {
  __m512 sum[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) sum[i] = _mm512_setzero_ps();
  const uint16_t* weights = operand.weights;
  const uint16_t* block = operand.from + tile.from * kBlock;
  for (int64_t i = 0; i < operand.blocks; ++i, block += operand.block_values) {
    // The next block is far away, and no prefetcher knows where.
    if (i + 1 < operand.blocks)
#pragma GCC unroll 16
      for (int row = 0; row < kTile; ++row)
        __builtin_prefetch(block + operand.block_values + (operand.taps[0] + row) * kBlock);
    const int64_t pairs = i < operand.whole ? kBlock / 2 : operand.pairs;
    for (int64_t tap = 0; tap < operand.tap_count; ++tap, weights += kWeights) {
      const uint16_t* a = block + operand.taps[tap] * kBlock;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const __m512bh b = (__m512bh)_mm512_loadu_si512(weights + pair * 2 * kTile);
        __builtin_prefetch(weights + pair * 2 * kTile + kAhead);
#pragma GCC unroll 16
        for (int row = 0; row < kTile; ++row) {
          int32_t both;
          std::memcpy(&both, a + row * kBlock + 2 * pair, sizeof(both));
          sum[row] = _mm512_dpbf16_ps(sum[row], (__m512bh)_mm512_set1_epi32(both), b);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) _mm512_store_ps(sums + i * kTile, sum[i]);
}

// The first `count` of 32 lanes.
inline __mmask32 lane_mask32(int64_t count) {
  return count >= kBlock ? 0xFFFFFFFF : (uint32_t{1} << count) - 1;
}

RESFAST_BF16_INLINE __m512 relu6(__m512 x) { // NaN stays NaN
  return _mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_max_ps(_mm512_setzero_ps(), x));
}

RESFAST_BF16_INLINE __m512 hardswish(__m512 x) {
  const __m512 gate = relu6(_mm512_add_ps(x, _mm512_set1_ps(3.0f)));
  return _mm512_mul_ps(_mm512_mul_ps(x, gate), _mm512_set1_ps(1.0f / 6));
}

// Not inlined: the constants would be loaded outside of loops that do not need them.
RESFAST_BF16 __attribute__((noinline)) inline __m512 activated_slowly(
    __m512 value, int64_t activation, float negative_slope) {
  switch (activation) {
    case kHardsigmoid: {
      const __m512 gate = relu6(_mm512_add_ps(value, _mm512_set1_ps(3.0f)));
      return _mm512_mul_ps(gate, _mm512_set1_ps(1.0f / 6));
    }
    case kSigmoid: {
      const __m512 power = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), value));
      const __m512 one = _mm512_set1_ps(1.0f);
      const __mmask16 lost = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      return _mm512_mask_mov_ps(_mm512_div_ps(one, _mm512_add_ps(one, power)), lost, value);
    }
    default: return activated(value, activation, negative_slope);
  }
}

constexpr int64_t kOther = -1; // activations that loops are not compiled for

// Calls `use` with the activation as a constant.
template <class Use>
inline void with_activation(int64_t activation, Use use) {
  switch (activation) {
    case kNone: return use(std::integral_constant<int64_t, kNone>{});
    case kRelu: return use(std::integral_constant<int64_t, kRelu>{});
    case kRelu6: return use(std::integral_constant<int64_t, kRelu6>{});
    case kHardswish: return use(std::integral_constant<int64_t, kHardswish>{});
    default: return use(std::integral_constant<int64_t, kOther>{});
  }
}

template <int64_t kActivation>
RESFAST_BF16_INLINE __m512 activated_by(__m512 value, int64_t activation, float negative_slope) {
  if constexpr (kActivation == kNone) return value;
  if constexpr (kActivation == kRelu) // NaN stays NaN
    return _mm512_max_ps(_mm512_setzero_ps(), value);
  if constexpr (kActivation == kRelu6) return relu6(value);
  if constexpr (kActivation == kHardswish) return hardswish(value);
  return activated_slowly(value, activation, negative_slope);
}

// What is done with the sums of a panel.
struct Epilogue {
  char* to; // the panel's outputs of line 0
  int64_t to_bytes; // from one line to the next
  const char* residual; // likewise, of lines of 64 bytes; null: none
  const float* bias; // of the panel
  int64_t activation;
  float negative_slope;
  __mmask16 lanes; // outputs that there are; the others are 0
  __mmask16 mask; // outputs that are written
  bool fills; // zeros follow, up to the end of the line
  int64_t last; // lines from this one on are left out
};

template <bool kResidual, int64_t kActivation>
RESFAST_BF16_INLINE void finish_row(
    const Epilogue& e, __m512 bias, const float* sums, int64_t to, int64_t residual) {
  __m512 value = _mm512_add_ps(_mm512_load_ps(sums), bias);
  if (kResidual)
    value = _mm512_add_ps(
        value,
        load_bf16(0xFFFF, reinterpret_cast<const uint16_t*>(e.residual + residual * kLine)));
  auto* out = reinterpret_cast<uint16_t*>(e.to + to * e.to_bytes);
  value = activated_by<kActivation>(value, e.activation, e.negative_slope);
  store_bf16(e.mask, out, _mm512_maskz_mov_ps(e.lanes, value)); // weights of 0 times infinity
}

// Zeros after the last panel of lines that it does not fill.
inline void fill(const Epilogue& e, const Tile& tile, const int32_t* tables) {
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t to = tile.rows < 0 ? tile.to + i : tables[tile.rows + 2 * i];
    if (to >= 0) std::memset(e.to + to * e.to_bytes + kLine / 2, 0, kLine / 2);
  }
}

template <bool kResidual, int64_t kActivation>
RESFAST_BF16 void finish_tile(
    const Epilogue& e, const Tile& tile, const int32_t* tables, const float* sums) {
  const __m512 bias = _mm512_loadu_ps(e.bias);
  if (tile.rows < 0 && tile.to + kTile <= e.last) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i)
      finish_row<kResidual, kActivation>(e, bias, sums + i * kTile, tile.to + i, tile.residual + i);
    return;
  }
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t to = tile.rows < 0 ? tile.to + i : tables[tile.rows + 2 * i];
    const int64_t residual = tile.rows < 0 ? tile.residual + i : tables[tile.rows + 2 * i + 1];
    if (to < 0 || to >= e.last) continue;
    finish_row<kResidual, kActivation>(e, bias, sums + i * kTile, to, residual);
  }
}

inline void finish(
    const Epilogue& e, const Tile& tile, const int32_t* tables, const float* sums) {
  if (e.fills) fill(e, tile, tables);
  with_activation(e.activation, [&](auto activation) {
    e.residual ? finish_tile<true, activation.value>(e, tile, tables, sums)
               : finish_tile<false, activation.value>(e, tile, tables, sums);
  });
}

inline Operand operand_of(const Step& step, const Memory& memory) {
  const int64_t whole = step.channels / kBlock;
  return {reinterpret_cast<const uint16_t*>(memory.line(step.from.line)),
          step.from.block_lines * kBlock, step.blocks, step.tap_count,
          memory.tables + step.taps, nullptr, whole, ceil_div(step.channels - whole * kBlock, 2)};
}

// Weights of the first panel.
inline const uint16_t* weights_of(const Step& step, const Memory& memory) {
  return reinterpret_cast<const uint16_t*>(memory.constants + step.weights * kLine);
}

// Of outputs `panel` * 16 on.
inline Epilogue epilogue_of(const Step& step, const Memory& memory, int64_t panel) {
  Epilogue e{};
  e.activation = step.activation;
  std::memcpy(&e.negative_slope, &step.negative_slope, sizeof(float));
  e.bias = reinterpret_cast<const float*>(memory.constants + step.bias * kLine) + panel * kTile;
  e.lanes = lane_mask(step.outputs - panel * kTile);
  const int64_t block = panel / 2, half = panel % 2 * kLine / 2;
  if (step.residual.line >= 0)
    e.residual = memory.line(step.residual.line + block * step.residual.block_lines) + half;
  if (step.to.line >= 0) {
    e.to = memory.line(step.to.line + block * step.to.block_lines) + half;
    e.to_bytes = kLine, e.last = INT64_MAX, e.mask = 0xFFFF;
    e.fills = half == 0 && (panel + 1) * kTile >= step.outputs;
    return e;
  }
  const int64_t pixels = step.out_height * step.out_width;
  e.to = reinterpret_cast<char*>(
      static_cast<uint16_t*>(memory.result) + step.first_image * pixels * step.outputs +
      panel * kTile);
  e.to_bytes = 2 * step.outputs, e.last = (memory.images - step.first_image) * pixels;
  e.mask = e.lanes;
  return e;
}

inline void conv_avx512(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
    int64_t last_panel) {
  const auto* tiles = reinterpret_cast<const Tile*>(memory.tables + step.tiles);
  Operand operand = operand_of(step, memory);
  alignas(64) float sums[kSums];
  for (int64_t first = begin; first < end; first += step.tiles_at_once) {
    const int64_t last = std::min(end, first + step.tiles_at_once);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      operand.weights =
          weights_of(step, memory) + panel * step.blocks * step.tap_count * kWeights;
      const Epilogue epilogue = epilogue_of(step, memory, panel);
      for (int64_t tile = first; tile < last; ++tile) {
        multiply_avx512(operand, tiles[tile], sums);
        finish(epilogue, tiles[tile], memory.tables, sums);
      }
    }
  }
}

} // namespace resfast::network
