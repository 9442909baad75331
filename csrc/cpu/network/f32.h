// The steps of a plan on lines of float32, in terms of the vectors of an instruction set: `Vector` and
// what is computed with it stand in the file that includes this one, in RESFAST_F32_NAMESPACE.
//
// A line has 16 channels. A convolution multiplies tiles of kRows pixels, wherever their lines are, with
// panels of 16 outputs.
//
// Weights: [panel of 16 outputs][block of 16 channels][tap][channel][output].
#pragma once

#include "f32_lines.h"

namespace resfast::network::RESFAST_F32_NAMESPACE {
namespace {

// What a panel of weights is multiplied with.
struct Operand {
  const float* from; // of the map
  int64_t block_values; // from one block of channels to the next
  int64_t blocks, tap_count;
  const int32_t* taps; // lines
  const float* weights;
  int64_t panel_values; // from one panel of weights to the next
};

// sums [panel][kRows pixels][output] of the first kCount pixels of a tile and kPanels panels.
template <int kPanels, int kCount>
RESFAST_F32 void multiply(const Operand& operand, const Pixel* pixels, float* sums) {
  Vector sum[kCount][kPanels][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][j][v] = splat(0.0f);
  const float* weights = operand.weights;
  const float* block = operand.from;
  for (int64_t b = 0; b < operand.blocks; ++b, block += operand.block_values)
    for (int64_t tap = 0; tap < operand.tap_count; ++tap, weights += kLanes * kTile) {
      const int64_t shift = operand.taps[tap];
      const float* a[kCount];
#pragma GCC unroll 6
      for (int i = 0; i < kCount; ++i) a[i] = block + (pixels[i].from + shift) * kLanes;
      const float* panel[kPanels];
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) {
        panel[j] = weights + j * operand.panel_values;
        // GCC would keep the address of each channel in memory.
        asm("" : "+r"(panel[j]));
      }
#pragma GCC unroll kUnrolled
      for (int channel = 0; channel < kLanes; ++channel) {
        Vector w[kPanels][kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kPanels; ++j)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v)
            w[j][v] = load(panel[j] + channel * kTile + v * kVector);
#pragma GCC unroll 6
        for (int i = 0; i < kCount; ++i) {
          const Vector value = splat(a[i][channel]);
#pragma GCC unroll 4
          for (int j = 0; j < kPanels; ++j)
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v)
              sum[i][j][v] = multiply_add(value, w[j][v], sum[i][j][v]);
        }
      }
    }
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        store(sums + (j * kRows + i) * kTile + v * kVector, sum[i][j][v]);
}

template <int kPanels>
void multiply(const Operand& operand, const Pixel* pixels, int64_t count, float* sums) {
  switch (count) {
    case 6: return multiply<kPanels, 6>(operand, pixels, sums);
    case 5: return multiply<kPanels, 5>(operand, pixels, sums);
    default: return multiply<kPanels, 4>(operand, pixels, sums);
  }
}

// The first `count` pixels; the others of the tile may be computed as well.
inline void multiply(
    const Operand& operand, const Pixel* pixels, int64_t count, int64_t panels, float* sums) {
  if constexpr (kMostPanels > 1) {
    switch (panels) {
      case 1: break;
      case 2: return multiply<2>(operand, pixels, count, sums);
      case 3: return multiply<3>(operand, pixels, count, sums);
      default: return multiply<4>(operand, pixels, count, sums);
    }
  }
  multiply<1>(operand, pixels, count, sums);
}

// What is done with the sums of a panel.
struct Epilogue {
  char* to; // the panel's outputs of line 0
  int64_t to_bytes; // from one line to the next
  bool inside; // the result is a map of the arena, whose lines are filled up with zeros
  bool narrow; // the result is bfloat16
  int64_t outputs; // that there are
  const float* residual; // of line 0; null: none
  const float* bias; // of the panel
  int64_t activation;
  float negative_slope;
};

// Of outputs `panel` * 16 on.
inline Epilogue epilogue_of(const Step& step, const Memory& memory, int64_t panel) {
  Epilogue e{};
  e.activation = step.activation;
  std::memcpy(&e.negative_slope, &step.negative_slope, sizeof(float));
  e.bias = reinterpret_cast<const float*>(memory.constants + step.bias * kLine) + panel * kTile;
  if (step.residual.line >= 0)
    e.residual = lines_of(memory, step.residual, panel);
  e.outputs = std::min(kTile, step.outputs - panel * kTile);
  e.inside = step.to.line >= 0;
  if (e.inside) {
    e.to = memory.line(step.to.line + panel * step.to.block_lines);
    e.to_bytes = kLine;
    return e;
  }
  const int64_t bytes = memory.wide_result ? sizeof(float) : sizeof(uint16_t);
  const int64_t first = step.first_image * step.out_height * step.out_width * step.outputs;
  e.to = static_cast<char*>(memory.result) + (first + panel * kTile) * bytes;
  e.to_bytes = step.outputs * bytes;
  e.narrow = !memory.wide_result;
  return e;
}

// Of the step's images, those that the batch has: it may end within an item.
inline int64_t images_here(const Step& step, const Memory& memory) {
  return std::min(step.images, memory.images - step.first_image);
}

// The result of a pixel for a panel.
RESFAST_F32_INLINE void finish(
    const Epilogue& e, const Line& bias, Line value, int64_t to, int64_t residual) {
  value = value + bias;
  if (e.residual) value = value + load_line(e.residual + residual * kLanes);
  if (e.activation == kRelu) value = relu(value);
  else if (e.activation != kNone) activate(value, e.activation, e.negative_slope);
  char* place = e.to + to * e.to_bytes;
  if (e.outputs == kTile && !e.narrow)
    return store_line(reinterpret_cast<float*>(place), value);
  if (!e.inside) return store_result(place, value, e.outputs, e.narrow);
  // Weights of 0 do not make a lane 0: the input may be infinite.
  alignas(kLine) float values[kLanes];
  store_line(values, value);
  store_line(reinterpret_cast<float*>(place), load_first_line(values, e.outputs));
}

// Results of a tile; not of lines from `last` on.
RESFAST_F32 inline void conv_tile(
    const Operand& operand, const Epilogue* epilogues, const Pixel* pixels, int64_t panels,
    int64_t last = INT64_MAX) {
  alignas(kLine) float sums[kMostPanels * kRows * kTile];
  multiply(operand, pixels, kRows, panels, sums);
  for (int64_t j = 0; j < panels; ++j) {
    const Line bias = load_line(epilogues[j].bias);
    for (int64_t i = 0; i < kRows; ++i) {
      if (pixels[i].to < 0 || pixels[i].to >= last) continue;
      const Line value = load_line(sums + (j * kRows + i) * kTile);
      finish(epilogues[j], bias, value, pixels[i].to, pixels[i].residual);
    }
  }
}

inline Operand operand_of(const Step& step, const Memory& memory) {
  const int64_t panel_values = step.blocks * step.tap_count * kLanes * kTile;
  return {lines_of(memory, step.from, 0), step.from.block_lines * kLanes, step.blocks,
          step.tap_count, memory.tables + step.taps,
          reinterpret_cast<const float*>(memory.constants + step.weights * kLine), panel_values};
}

inline void conv(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
    int64_t last_panel) {
  const auto* pixels = reinterpret_cast<const Pixel*>(memory.tables + step.tiles);
  const Operand all = operand_of(step, memory);
  const int64_t count = images_here(step, memory) * step.out_height * step.out_width;
  end = std::min(end, ceil_div(count, kRows));
  const int64_t last_to = step.to.line < 0 ? count : INT64_MAX; // of the result of the plan
  for (int64_t first = begin; first < end; first += step.tiles_at_once) {
    const int64_t last = std::min(end, first + step.tiles_at_once);
    for (int64_t panel = first_panel; panel < last_panel; panel += kMostPanels) {
      const int64_t panels = std::min<int64_t>(kMostPanels, last_panel - panel);
      Operand operand = all;
      operand.weights += panel * all.panel_values;
      Epilogue epilogues[kMostPanels];
      for (int64_t j = 0; j < panels; ++j) epilogues[j] = epilogue_of(step, memory, panel + j);
      for (int64_t tile = first; tile < last; ++tile)
        conv_tile(operand, epilogues, pixels + tile * kRows, panels, last_to);
    }
  }
}

// A convolution with one filter of its own for each channel.
RESFAST_F32 inline void depthwise(
    const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  const auto* pixels = reinterpret_cast<const Pixel*>(memory.tables + step.tiles);
  const int32_t* taps = memory.tables + step.taps;
  const int64_t count = images_here(step, memory) * step.out_height * step.out_width;
  end = std::min(end * kRows, count);
  for (int64_t block = 0; block < step.blocks; ++block) {
    const Epilogue e = epilogue_of(step, memory, block);
    const float* from = lines_of(memory, step.from, block);
    const auto* weights = reinterpret_cast<const float*>(
        memory.constants + (step.weights + block * step.tap_count) * kLine);
    const Line bias = load_line(e.bias);
    for (int64_t i = begin * kRows; i < end; ++i) {
      Line sum = splat_line(0.0f);
      for (int64_t tap = 0; tap < step.tap_count; ++tap) {
        const Line x = load_line(from + (pixels[i].from + taps[tap]) * kLanes);
        const Line w = load_line(weights + tap * kLanes);
        sum = line_from([&](int v) RESFAST_F32 {
          return multiply_add(x.part[v], w.part[v], sum.part[v]);
        });
      }
      finish(e, bias, sum, pixels[i].to, pixels[i].residual);
    }
  }
}

} // namespace
} // namespace resfast::network::RESFAST_F32_NAMESPACE

#include "f32_pointwise.h"
#include "f32_winograd.h"

namespace resfast::network::RESFAST_F32_NAMESPACE {
namespace {

constexpr Kernels kKernels{
    conv, winograd, nullptr, head, depthwise, patches, enter, pool<false>, pool<true>, mean, pointwise};

} // namespace
} // namespace resfast::network::RESFAST_F32_NAMESPACE
