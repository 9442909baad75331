// Convolution of maps in lines: 16 pixels times 16 outputs at a time, summed over taps and channels.
//
// Weights: [panel of 16 outputs][block of 32 channels][tap][pair][output][2].
#pragma once

#include "../conv/conv_bf16.h"
#include "kernels.h"

namespace resfast::network {

constexpr int64_t kMostTiles = 4; // multiplied with the same weights
constexpr int64_t kWeights = kTile * kBlock; // of a tap, a block and a panel
constexpr int64_t kSums = kTile * kTile;

// What a panel of weights is multiplied with.
struct Operand {
  const uint16_t* from; // of the map
  int64_t block_values; // from one block of channels to the next
  int64_t blocks, tap_count;
  const int32_t* taps; // lines
  const uint16_t* weights;
};

template <int kTiles>
RESFAST_AMX void multiply_amx(const Operand& operand, const Tile* tiles, float* sums) {
  asm volatile("" ::: "memory"); // GCC does not know that a tile's load reads memory
  amx::zero<0>();
  if constexpr (kTiles > 1) amx::zero<1>();
  if constexpr (kTiles > 2) amx::zero<2>();
  if constexpr (kTiles > 3) amx::zero<3>();
  const uint16_t* weights = operand.weights;
  const uint16_t* block = operand.from;
  for (int64_t i = 0; i < operand.blocks; ++i, block += operand.block_values) {
    const uint16_t* a[kTiles];
    for (int j = 0; j < kTiles; ++j) a[j] = block + tiles[j].from * kBlock;
    for (int64_t tap = 0; tap < operand.tap_count; ++tap, weights += kWeights) {
      const int64_t shift = operand.taps[tap] * kBlock;
      amx::load<6>(weights, kLine);
      amx::load<4>(a[0] + shift, kLine);
      amx::multiply<0, 4, 6>();
      if constexpr (kTiles > 1) {
        amx::load<5>(a[1] + shift, kLine);
        amx::multiply<1, 5, 6>();
      }
      if constexpr (kTiles > 2) {
        amx::load<4>(a[2] + shift, kLine);
        amx::multiply<2, 4, 6>();
      }
      if constexpr (kTiles > 3) {
        amx::load<5>(a[3] + shift, kLine);
        amx::multiply<3, 5, 6>();
      }
    }
  }
  amx::store<0>(sums, kLine);
  if constexpr (kTiles > 1) amx::store<1>(sums + kSums, kLine);
  if constexpr (kTiles > 2) amx::store<2>(sums + 2 * kSums, kLine);
  if constexpr (kTiles > 3) amx::store<3>(sums + 3 * kSums, kLine);
  asm volatile("" ::: "memory");
}

RESFAST_BF16 inline void multiply_avx512(const Operand& operand, const Tile& tile, float* sums) {
  __m512 sum[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) sum[i] = _mm512_setzero_ps();
  const uint16_t* weights = operand.weights;
  const uint16_t* block = operand.from + tile.from * kBlock;
  for (int64_t i = 0; i < operand.blocks; ++i, block += operand.block_values)
    for (int64_t tap = 0; tap < operand.tap_count; ++tap) {
      const uint16_t* a = block + operand.taps[tap] * kBlock;
      for (int64_t pair = 0; pair < kBlock / 2; ++pair, weights += 2 * kTile) {
        const __m512bh b = (__m512bh)_mm512_loadu_si512(weights);
#pragma GCC unroll 16
        for (int row = 0; row < kTile; ++row) {
          int32_t both;
          std::memcpy(&both, a + row * kBlock + 2 * pair, sizeof(both));
          sum[row] = _mm512_dpbf16_ps(sum[row], (__m512bh)_mm512_set1_epi32(both), b);
        }
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) _mm512_store_ps(sums + i * kTile, sum[i]);
}

inline void multiply(const Operand& operand, const Tile* tiles, int64_t count, float* sums) {
  if (!amx::supported()) {
    for (int64_t i = 0; i < count; ++i) multiply_avx512(operand, tiles[i], sums + i * kSums);
    return;
  }
  switch (count) {
    case 1: return multiply_amx<1>(operand, tiles, sums);
    case 2: return multiply_amx<2>(operand, tiles, sums);
    case 3: return multiply_amx<3>(operand, tiles, sums);
    default: return multiply_amx<4>(operand, tiles, sums);
  }
}

// What is done with the sums of a panel.
struct Epilogue {
  char* to; // the panel's outputs of line 0
  int64_t to_bytes; // from one line to the next
  const char* residual; // likewise, of lines of 64 bytes; null: none
  const float* bias; // of the panel
  int64_t activation;
  float negative_slope;
  __mmask16 mask; // outputs that there are
  int64_t last; // lines from this one on are left out
};

template <bool kResidual, bool kRelu>
RESFAST_BF16_INLINE void finish_row(
    const Epilogue& e, __m512 bias, const float* sums, int64_t to, int64_t residual) {
  __m512 value = _mm512_add_ps(_mm512_load_ps(sums), bias);
  if (kResidual)
    value = _mm512_add_ps(
        value,
        load_bf16(0xFFFF, reinterpret_cast<const uint16_t*>(e.residual + residual * kLine)));
  auto* out = reinterpret_cast<uint16_t*>(e.to + to * e.to_bytes);
  if (kRelu)
    return store_bf16(e.mask, out, _mm512_max_ps(_mm512_setzero_ps(), value)); // NaN stays NaN
  if (e.activation >= kSilu) return finish_slowly(out, e.mask, value, e.activation);
  store_bf16(e.mask, out, activated(value, e.activation, e.negative_slope));
}

template <bool kResidual, bool kRelu>
RESFAST_BF16 void finish_tile(
    const Epilogue& e, const Tile& tile, const int32_t* tables, const float* sums) {
  const __m512 bias = _mm512_loadu_ps(e.bias);
  if (tile.rows < 0 && tile.to + kTile <= e.last) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i)
      finish_row<kResidual, kRelu>(e, bias, sums + i * kTile, tile.to + i, tile.residual + i);
    return;
  }
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t to = tile.rows < 0 ? tile.to + i : tables[tile.rows + 2 * i];
    const int64_t residual = tile.rows < 0 ? tile.residual + i : tables[tile.rows + 2 * i + 1];
    if (to < 0 || to >= e.last) continue;
    finish_row<kResidual, kRelu>(e, bias, sums + i * kTile, to, residual);
  }
}

inline void finish(
    const Epilogue& e, const Tile& tile, const int32_t* tables, const float* sums) {
  const bool relu = e.activation == kRelu;
  if (e.residual)
    return relu ? finish_tile<true, true>(e, tile, tables, sums)
                : finish_tile<true, false>(e, tile, tables, sums);
  return relu ? finish_tile<false, true>(e, tile, tables, sums)
              : finish_tile<false, false>(e, tile, tables, sums);
}

} // namespace resfast::network
