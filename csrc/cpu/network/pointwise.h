// activation((x * scale + shift) * gate + residual) of maps in lines of bfloat16.
//
// The gate is a map of the same size, or one pixel for a whole image. The result is a map, a part of a
// map that is a concatenation, from any channel on, or the result of the plan.
#pragma once

#include "lines.h"

namespace resfast::network {

RESFAST_BF16_INLINE __m512 widened(const uint16_t* values) { return load_bf16(0xFFFF, values); }

// Writes both halves of a line.
RESFAST_BF16_INLINE void store_pair(uint16_t* line, __m512 low, __m512 high) {
  _mm512_storeu_si512(line, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Where the results of one block of channels of a step are written.
struct PointwiseTarget {
  uint16_t* to; // line 0, or the first pixel of the plan's result
  int64_t next_block; // values up to the next block of channels
  int64_t lane, count; // the first of the lanes, and how many
  bool is_part, is_result;
};

RESFAST_BF16_INLINE void store_at(const PointwiseTarget& target, int64_t at, __m512i line) {
  uint16_t* out = target.to + at;
  const __mmask32 lanes = lane_mask32(target.count);
  if (target.is_result) return _mm512_mask_storeu_epi16(out, lanes, line);
  if (!target.is_part) return _mm512_store_si512(out, _mm512_maskz_mov_epi16(lanes, line));
  const __mmask32 here = lane_mask32(kBlock - target.lane);
  _mm512_mask_storeu_epi16(out + target.lane, lanes & here, line);
  if (lanes & ~here)
    _mm512_mask_storeu_epi16(out + target.next_block + target.lane - kBlock, lanes & ~here, line);
}

inline PointwiseTarget pointwise_target(const Step& step, const Memory& memory, int64_t block) {
  PointwiseTarget target{};
  target.count = std::min(kBlock, step.outputs - block * kBlock);
  target.is_result = step.to.line < 0;
  if (target.is_result) {
    target.to = static_cast<uint16_t*>(memory.result) + block * kBlock;
    return target;
  }
  target.to = reinterpret_cast<uint16_t*>(
      memory.line(step.to.line + block * step.to.block_lines));
  target.next_block = step.to.block_lines * kBlock;
  target.lane = step.lane, target.is_part = step.part;
  return target;
}

inline const uint16_t* lines_of(const Memory& memory, const Map& map, int64_t block) {
  return map.line < 0 ? nullptr
                      : reinterpret_cast<const uint16_t*>(
                            memory.line(map.line + block * map.block_lines));
}

template <int64_t kActivation>
RESFAST_BF16 void pointwise_by(
    const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  float slope;
  std::memcpy(&slope, &step.negative_slope, sizeof(float));
  const auto* scale = reinterpret_cast<const float*>(memory.constants + step.weights * kLine);
  const auto* shift = reinterpret_cast<const float*>(memory.constants + step.bias * kLine);
  const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  for (int64_t block = 0; block < step.blocks; ++block, scale += kBlock, shift += kBlock) {
    const bool scales = step.weights >= 0;
    const __m512 scale_low = scales ? _mm512_load_ps(scale) : one;
    const __m512 scale_high = scales ? _mm512_load_ps(scale + kTile) : one;
    const __m512 shift_low = scales ? _mm512_load_ps(shift) : zero;
    const __m512 shift_high = scales ? _mm512_load_ps(shift + kTile) : zero;
    const PointwiseTarget target = pointwise_target(step, memory, block);
    const uint16_t* from = lines_of(memory, step.from, block);
    const uint16_t* gates = lines_of(memory, step.gate, block);
    const uint16_t* residuals = lines_of(memory, step.residual, block);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / step.out_height, row = i % step.out_height;
      if (step.first_image + image >= memory.images) break;
      const RowLines read(step.from, image, row), written(step.to, image, row);
      const RowLines gated(step.gate, image, step.one_gate ? 0 : row);
      const RowLines added(step.residual, image, row);
      const int64_t first = ((step.first_image + image) * step.out_height + row) * step.out_width;
      for (int64_t column = 0; column < step.out_width; ++column) {
        const uint16_t* values = from + read.at(column) * kBlock;
        __m512 low = widened(values), high = widened(values + kTile);
        if (scales) {
          low = _mm512_fmadd_ps(low, scale_low, shift_low);
          high = _mm512_fmadd_ps(high, scale_high, shift_high);
        }
        if (gates) {
          const uint16_t* gate = gates + gated.at(step.one_gate ? 0 : column) * kBlock;
          low = _mm512_mul_ps(low, widened(gate));
          high = _mm512_mul_ps(high, widened(gate + kTile));
        }
        if (residuals) {
          const uint16_t* residual = residuals + added.at(column) * kBlock;
          low = _mm512_add_ps(low, widened(residual));
          high = _mm512_add_ps(high, widened(residual + kTile));
        }
        low = activated_by<kActivation>(low, step.activation, slope);
        high = activated_by<kActivation>(high, step.activation, slope);
        const int64_t at = target.is_result ? (first + column) * step.outputs
                                            : written.at(column) * kBlock;
        store_at(target, at, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
    }
  }
}

inline void pointwise(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  with_activation(step.activation, [&](auto activation) {
    pointwise_by<activation.value>(step, memory, begin, end);
  });
}

} // namespace resfast::network
