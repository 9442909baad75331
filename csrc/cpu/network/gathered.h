// Convolutions of lines of bfloat16 for maps so small that tiles of consecutive lines would hold more
// margins than pixels: the lines that a tile of 16 pixels reads are copied first.
#pragma once

#include "lines.h"

namespace resfast::network {

// Copies what a tile reads: lines [block][tap][pixel].
RESFAST_BF16 inline void gather(
    const Operand& operand, const Pixel* pixels, uint16_t* to) {
  const uint16_t* block = operand.from;
  for (int64_t i = 0; i < operand.blocks; ++i, block += operand.block_values)
    for (int64_t tap = 0; tap < operand.tap_count; ++tap)
      for (int64_t pixel = 0; pixel < kTile; ++pixel, to += kBlock)
        _mm512_store_si512(
            to, _mm512_load_si512(block + (pixels[pixel].from + operand.taps[tap]) * kBlock));
}

template <bool kResidual, int64_t kActivation>
RESFAST_BF16 void finish_pixels(const LineEpilogue& e, const Pixel* pixels, const float* sums) {
  for (int64_t i = 0; i < kTile; ++i)
    if (pixels[i].to >= 0 && pixels[i].to < e.last)
      finish_line<kResidual, kActivation>(
          e, sums + i * kTile, pixels[i].to, pixels[i].residual);
}

// Panels of which the first is even.
inline void gathered(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
    int64_t last_panel) {
  static constexpr int32_t kHere = 0;
  static constexpr Tile kFirst{0, 0, 0, -1};
  const auto* pixels = reinterpret_cast<const Pixel*>(memory.tables + step.tiles);
  const Operand all = operand_of(step, memory);
  const int64_t places = step.blocks * step.tap_count;
  thread_local Workspace<uint16_t> workspace;
  uint16_t* copies = workspace.get(step.tiles_at_once * places * kTile * kBlock);
  alignas(kLine) float sums[2 * kSums] = {};
  for (int64_t first = begin; first < end; first += step.tiles_at_once) {
    const int64_t last = std::min(end, first + step.tiles_at_once);
    for (int64_t tile = first; tile < last; ++tile)
      gather(all, pixels + tile * kTile, copies + (tile - first) * places * kTile * kBlock);
    for (int64_t panel = first_panel; panel < last_panel; panel += 2) {
      const LineEpilogue e = line_epilogue_of(step, memory, panel);
      const int64_t panels = std::min<int64_t>(2, last_panel - panel);
      for (int64_t tile = first; tile < last; ++tile) {
        for (int64_t half = 0; half < panels; ++half) {
          const Operand operand{
              copies + (tile - first) * places * kTile * kBlock, kTile * kBlock, places, 1, &kHere,
              weights_of(step, memory) + (panel + half) * places * kWeights,
              all.whole * step.tap_count, all.pairs};
          multiply_avx512(operand, kFirst, sums + half * kSums);
        }
        const Pixel* here = pixels + tile * kTile;
        with_activation(step.activation, [&](auto activation) {
          e.residual ? finish_pixels<true, activation.value>(e, here, sums)
                     : finish_pixels<false, activation.value>(e, here, sums);
        });
      }
    }
  }
}

} // namespace resfast::network
