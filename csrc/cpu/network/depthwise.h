// Convolution of lines of bfloat16 with one filter of its own for each channel.
//
// A line of 32 channels is 16 pairs: the even channels are the lower halves of 32 bits, the odd ones the
// upper halves, so that both become float32 by one operation. Bias [block][channel] and weights
// [block][tap][channel] are float32 with the 16 even channels of a block before the 16 odd ones.
#pragma once

#include "lines.h"

namespace resfast::network {

RESFAST_BF16_INLINE void depthwise_line(
    const LineEpilogue& e, const uint16_t* from, const int32_t* taps, int64_t tap_count,
    const float* weights, int64_t to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  __m512 even = _mm512_loadu_ps(e.bias), odd = _mm512_loadu_ps(e.bias + kTile);
  for (int64_t tap = 0; tap < tap_count; ++tap, weights += kBlock) {
    const __m512i line = _mm512_load_si512(from + taps[tap] * kBlock);
    const __m512 lower = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
    even = _mm512_fmadd_ps(lower, _mm512_load_ps(weights), even);
    odd = _mm512_fmadd_ps(
        _mm512_castsi512_ps(_mm512_and_si512(line, upper)), _mm512_load_ps(weights + kTile), odd);
  }
  if (e.activation == kRelu) { // NaN stays NaN
    even = _mm512_max_ps(_mm512_setzero_ps(), even), odd = _mm512_max_ps(_mm512_setzero_ps(), odd);
  } else if (e.activation == kRelu6) {
    even = relu6(even), odd = relu6(odd);
  } else if (e.activation != kNone) {
    even = activated_slowly(even, e.activation, e.negative_slope);
    odd = activated_slowly(odd, e.activation, e.negative_slope);
  }
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  store_line(e, to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

RESFAST_BF16 inline void depthwise(
    const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  const auto* tiles = reinterpret_cast<const Tile*>(memory.tables + step.tiles);
  const int32_t* taps = memory.tables + step.taps;
  for (int64_t block = 0; block < step.blocks; ++block) {
    LineEpilogue e = line_epilogue_of(step, memory, 2 * block);
    const auto* from = reinterpret_cast<const uint16_t*>(
        memory.line(step.from.line + block * step.from.block_lines));
    const auto* weights = reinterpret_cast<const float*>(
        memory.constants + (step.weights + block * step.tap_count * 2) * kLine);
    for (int64_t t = begin; t < end; ++t) {
      const Tile& tile = tiles[t];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t to = tile.rows < 0 ? tile.to + i : memory.tables[tile.rows + 2 * i];
        if (to < 0 || to >= e.last) continue;
        depthwise_line(e, from + (tile.from + i) * kBlock, taps, step.tap_count, weights, to);
      }
    }
  }
}

} // namespace resfast::network
