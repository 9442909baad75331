// Convolution of lines of bfloat16 with one filter of its own for each channel.
//
// A line of 32 channels is 16 pairs: the even channels are the lower halves of 32 bits, the odd ones the
// upper halves, so that both become float32 by one operation. Bias [block][channel] and weights
// [block][tap][channel] are float32 with the 16 even channels of a block before the 16 odd ones.
#pragma once

#include "lines.h"

namespace resfast::network {

constexpr int kTogether = 4; // pixels, so that sums do not wait for each other

// Sums of some pixels whose lines follow each other.
template <int64_t kActivation>
RESFAST_BF16_INLINE void depthwise_lines(
    const LineEpilogue& e, const uint16_t* from, const int32_t* taps, int64_t tap_count,
    const float* weights, const int64_t* to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  __m512 even[kTogether], odd[kTogether];
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) {
    even[i] = _mm512_loadu_ps(e.bias);
    odd[i] = _mm512_loadu_ps(e.bias + kTile);
  }
  for (int64_t tap = 0; tap < tap_count; ++tap, weights += kBlock) {
    const __m512 of_even = _mm512_load_ps(weights), of_odd = _mm512_load_ps(weights + kTile);
    const uint16_t* first = from + taps[tap] * kBlock;
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      const __m512i line = _mm512_load_si512(first + i * kBlock);
      const __m512 lower = _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
      even[i] = _mm512_fmadd_ps(lower, of_even, even[i]);
      odd[i] = _mm512_fmadd_ps(
          _mm512_castsi512_ps(_mm512_and_si512(line, upper)), of_odd, odd[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTogether; ++i) {
    if (to[i] < 0 || to[i] >= e.last) continue;
    even[i] = activated_by<kActivation>(even[i], e.activation, e.negative_slope);
    odd[i] = activated_by<kActivation>(odd[i], e.activation, e.negative_slope);
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even[i]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd[i]));
    store_line(e, to[i], _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

template <int64_t kActivation>
RESFAST_BF16 void depthwise_block(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t block) {
  const auto* tiles = reinterpret_cast<const Tile*>(memory.tables + step.tiles);
  const int32_t* taps = memory.tables + step.taps;
  const LineEpilogue e = line_epilogue_of(step, memory, 2 * block);
  const auto* from = reinterpret_cast<const uint16_t*>(
      memory.line(step.from.line + block * step.from.block_lines));
  const auto* weights = reinterpret_cast<const float*>(
      memory.constants + (step.weights + block * step.tap_count * 2) * kLine);
  for (int64_t t = begin; t < end; ++t) {
    const Tile& tile = tiles[t];
    for (int64_t i = 0; i < kTile; i += kTogether) {
      int64_t to[kTogether];
      bool some = false;
      for (int64_t j = 0; j < kTogether; ++j) {
        to[j] = tile.rows < 0 ? tile.to + i + j : memory.tables[tile.rows + 2 * (i + j)];
        some |= to[j] >= 0 && to[j] < e.last;
      }
      if (some)
        depthwise_lines<kActivation>(
            e, from + (tile.from + i) * kBlock, taps, step.tap_count, weights, to);
    }
  }
}

inline void depthwise(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  for (int64_t block = 0; block < step.blocks; ++block)
    with_activation(step.activation, [&](auto activation) {
      depthwise_block<activation.value>(step, memory, begin, end, block);
    });
}

} // namespace resfast::network
