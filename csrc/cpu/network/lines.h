// Results of whole lines of bfloat16.
#pragma once

#include "conv.h"

namespace resfast::network {

// What is done with the sums of both panels of a line.
struct LineEpilogue {
  char* to; // the outputs of line 0
  int64_t to_bytes; // from one line to the next
  bool inside; // whole lines are written, otherwise only the outputs that there are
  const char* residual; // of line 0, in lines of 64 bytes; null: none
  const float* bias; // of the panels
  int64_t activation;
  float negative_slope;
  __mmask32 lanes; // outputs that there are; the others are 0
  int64_t last; // lines from this one on are left out
};

// Of outputs `panel` * 16 on, where `panel` is even.
inline LineEpilogue line_epilogue_of(const Step& step, const Memory& memory, int64_t panel) {
  const Epilogue half = epilogue_of(step, memory, panel);
  return {half.to, half.to_bytes, step.to.line >= 0, half.residual, half.bias, half.activation,
          half.negative_slope, lane_mask32(step.outputs - panel * kTile), half.last};
}

// Writes the outputs of a pixel.
RESFAST_BF16_INLINE void store_line(const LineEpilogue& e, int64_t to, __m512i line) {
  char* out = e.to + to * e.to_bytes;
  if (e.inside) // weights of 0 do not make a lane 0: the input may be infinite
    _mm512_store_si512(out, _mm512_maskz_mov_epi16(e.lanes, line));
  else _mm512_mask_storeu_epi16(out, e.lanes, line);
}

// The outputs of a pixel from the sums of both panels.
template <bool kResidual, int64_t kActivation>
RESFAST_BF16_INLINE void finish_values(
    const LineEpilogue& e, __m512 low, __m512 high, int64_t to, int64_t residual) {
  low = _mm512_add_ps(low, _mm512_loadu_ps(e.bias));
  high = _mm512_add_ps(high, _mm512_loadu_ps(e.bias + kTile));
  if (kResidual) {
    const auto* line = reinterpret_cast<const uint16_t*>(e.residual + residual * kLine);
    low = _mm512_add_ps(low, load_bf16(0xFFFF, line));
    high = _mm512_add_ps(high, load_bf16(0xFFFF, line + kTile));
  }
  low = activated_by<kActivation>(low, e.activation, e.negative_slope);
  high = activated_by<kActivation>(high, e.activation, e.negative_slope);
  store_line(e, to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

template <bool kResidual, int64_t kActivation>
RESFAST_BF16_INLINE void finish_line(
    const LineEpilogue& e, const float* sums, int64_t to, int64_t residual) {
  finish_values<kResidual, kActivation>(
      e, _mm512_load_ps(sums), _mm512_load_ps(sums + kSums), to, residual);
}

// The sums of a tile and both panels of a line, [panel][pixel][output].
template <bool kResidual, int64_t kActivation>
RESFAST_BF16 void finish_lines(
    const LineEpilogue& e, const Tile& tile, const int32_t* tables, const float* sums) {
  if (tile.rows < 0 && tile.to + kTile <= e.last) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kTile; ++i)
      finish_line<kResidual, kActivation>(e, sums + i * kTile, tile.to + i, tile.residual + i);
    return;
  }
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t to = tile.rows < 0 ? tile.to + i : tables[tile.rows + 2 * i];
    const int64_t residual = tile.rows < 0 ? tile.residual + i : tables[tile.rows + 2 * i + 1];
    if (to >= 0 && to < e.last)
      finish_line<kResidual, kActivation>(e, sums + i * kTile, to, residual);
  }
}

inline void finish(
    const LineEpilogue& e, const Tile& tile, const int32_t* tables, const float* sums) {
  with_activation(e.activation, [&](auto activation) {
    e.residual ? finish_lines<true, activation.value>(e, tile, tables, sums)
               : finish_lines<false, activation.value>(e, tile, tables, sums);
  });
}

} // namespace resfast::network
