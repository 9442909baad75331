// activation((x * scale + shift) * gate + residual) of maps in lines of float32; part of f32.h. What
// pointwise.h says of gate and result holds here too.
#pragma once

namespace resfast::network::RESFAST_F32_NAMESPACE {
namespace {

// Writes the results of one block of channels of a pixel.
RESFAST_F32_INLINE void store_block(
    const Step& step, const Memory& memory, const Line& line, int64_t block, int64_t pixel,
    int64_t at) {
  const int64_t count = std::min(kLanes, step.outputs - block * kLanes);
  if (step.to.line < 0) {
    const int64_t bytes = memory.wide_result ? sizeof(float) : sizeof(uint16_t);
    char* out = static_cast<char*>(memory.result) + (pixel * step.outputs + block * kLanes) * bytes;
    return store_result(out, line, count, !memory.wide_result);
  }
  float* out = lines_of(memory, step.to, block) + at * kLanes;
  if (count == kLanes && step.lane == 0) return store_line(out, line);
  alignas(kLine) float values[kLanes];
  store_line(values, line);
  if (!step.part) return store_line(out, load_first_line(values, count));
  const int64_t here = std::min(count, kLanes - step.lane);
  std::memcpy(out + step.lane, values, here * sizeof(float));
  std::memcpy(out + step.to.block_lines * kLanes, values + here, (count - here) * sizeof(float));
}

RESFAST_F32 inline void pointwise(
    const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  float slope;
  std::memcpy(&slope, &step.negative_slope, sizeof(float));
  const bool scales = step.weights >= 0, gates = step.gate.line >= 0;
  const bool adds = step.residual.line >= 0;
  const auto* scale = reinterpret_cast<const float*>(memory.constants + step.weights * kLine);
  const auto* shift = reinterpret_cast<const float*>(memory.constants + step.bias * kLine);
  for (int64_t block = 0; block < step.blocks; ++block, scale += kLanes, shift += kLanes) {
    const Line factor = scales ? load_line(scale) : splat_line(1.0f);
    const Line term = scales ? load_line(shift) : splat_line(0.0f);
    const float* from = lines_of(memory, step.from, block);
    const float* gate = lines_of(memory, step.gate, block);
    const float* residual = lines_of(memory, step.residual, block);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / step.out_height, row = i % step.out_height;
      if (step.first_image + image >= memory.images) break;
      const RowLines read(step.from, image, row), written(step.to, image, row);
      const RowLines gated(step.gate, image, step.one_gate ? 0 : row);
      const RowLines added(step.residual, image, row);
      const int64_t first = ((step.first_image + image) * step.out_height + row) * step.out_width;
      for (int64_t column = 0; column < step.out_width; ++column) {
        Line value = load_line(from + read.at(column) * kLanes);
        if (scales)
          value = line_from([&](int v) RESFAST_F32 {
            return multiply_add(value.part[v], factor.part[v], term.part[v]);
          });
        if (gates) {
          const Line by = load_line(gate + gated.at(step.one_gate ? 0 : column) * kLanes);
          value = line_from([&](int v) RESFAST_F32 { return value.part[v] * by.part[v]; });
        }
        if (adds) value = value + load_line(residual + added.at(column) * kLanes);
        if (step.activation == kRelu) value = relu(value);
        else if (step.activation != kNone) activate(value, step.activation, slope);
        store_block(step, memory, value, block, first + column, written.at(column));
      }
    }
  }
}

} // namespace
} // namespace resfast::network::RESFAST_F32_NAMESPACE
