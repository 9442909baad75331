// Convolution of maps in lines on AMX.
//
// Up to four products of a tile of 16 pixels and a panel of 16 outputs are summed at a time, one in each
// of the tiles 0 to 3 of the matrix unit: of four tiles and one panel where many taps read the same
// pixels, of two tiles and both panels of a line for a single tap, and of several panels where there
// are few tiles, since a product must wait for the one before it in the same sum.
#pragma once

#include "lines.h"

namespace resfast::network {

// Weights that are fetched into the second cache while others are multiplied.
struct Ahead {
  const char* from;
  int64_t lines; // of each panel, for each tap
};

// Sums [tile][panel][pixel][output] of kTiles tiles and kPanels panels.
template <int kTiles, int kPanels>
RESFAST_AMX void multiply_amx(
    const Operand& operand, const Tile* tiles, Ahead ahead, float* sums) {
  constexpr int kProducts = kTiles * kPanels;
  static_assert(kProducts <= kMostTiles && (kTiles == 1 || kPanels <= 2));
  const int64_t panel_values = operand.blocks * operand.tap_count * kWeights;
  asm volatile("" ::: "memory"); // GCC does not know that a tile's load reads memory
  amx::zero<0>();
  if constexpr (kProducts > 1) amx::zero<1>();
  if constexpr (kProducts > 2) amx::zero<2>();
  if constexpr (kProducts > 3) amx::zero<3>();
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
      if constexpr (kPanels == 1) {
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
      } else {
        amx::load<7>(weights + panel_values, kLine);
        amx::multiply<1, 4, 7>();
        if constexpr (kTiles > 1) {
          amx::load<5>(a[1] + shift, kLine);
          amx::multiply<2, 5, 6>();
          amx::multiply<3, 5, 7>();
        }
        if constexpr (kPanels > 2) {
          amx::load<6>(weights + 2 * panel_values, kLine);
          amx::multiply<2, 4, 6>();
        }
        if constexpr (kPanels > 3) {
          amx::load<7>(weights + 3 * panel_values, kLine);
          amx::multiply<3, 4, 7>();
        }
      }
      for (int64_t line = 0; line < ahead.lines; ++line, ahead.from += kLine)
#pragma GCC unroll 4
        for (int j = 0; j < kPanels; ++j)
          _mm_prefetch(ahead.from + j * panel_values * 2, _MM_HINT_T1);
    }
  }
  amx::store<0>(sums, kLine);
  if constexpr (kProducts > 1) amx::store<1>(sums + kSums, kLine);
  if constexpr (kProducts > 2) amx::store<2>(sums + 2 * kSums, kLine);
  if constexpr (kProducts > 3) amx::store<3>(sums + 3 * kSums, kLine);
  asm volatile("" ::: "memory");
}

// A part of a step.
class AmxPart {
 public:
  AmxPart(const Step& step, const Memory& memory)
      : step_(step), memory_(memory), operand_(operand_of(step, memory)),
        panel_values_(step.blocks * step.tap_count * kWeights),
        fetches_(ceil_div(step.outputs, kTile) * panel_values_ * 2 >= kLeast),
        tiles_(reinterpret_cast<const Tile*>(memory.tables + step.tiles)) {}

  // Panels from an even one on.
  void run(int64_t begin, int64_t end, int64_t first_panel, int64_t last_panel) {
    for (int64_t first = begin; first < end; first += step_.tiles_at_once) {
      const int64_t count = std::min(end - first, step_.tiles_at_once);
      const int64_t together = count == 1 ? 4 : count == 2 || step_.tap_count == 1 ? 2 : 1;
      for (int64_t panel = first_panel; panel < last_panel; panel += together)
        panels(tiles_ + first, count, panel, std::min(together, last_panel - panel));
    }
  }

 private:
  static constexpr int64_t kLeast = 128 * 1024; // bytes of weights that are fetched ahead

  void panels(const Tile* tiles, int64_t count, int64_t panel, int64_t panels) {
    for (int64_t j = 0; j < panels; j += 2) {
      if (j + 1 < panels) lines_[j / 2] = line_epilogue_of(step_, memory_, panel + j);
      else half_ = epilogue_of(step_, memory_, panel + j);
    }
    operand_.weights = weights_of(step_, memory_) + panel * panel_values_;
    const auto* weights = reinterpret_cast<const char*>(operand_.weights);
    const int64_t most = kMostTiles / panels, groups = ceil_div(count, most);
    const int64_t bytes = panel_values_ * 2;
    for (int64_t group = 0; group < groups; ++group) {
      // In turn, a part of the next panels; one group would only take its own weights' bandwidth.
      Ahead ahead{weights + panels * bytes + bytes / groups * group, ceil_div(kTile, groups)};
      if (!fetches_ || groups == 1) ahead.lines = 0;
      multiply(tiles + group * most, std::min(most, count - group * most), panels, ahead);
    }
  }

  void multiply(const Tile* tiles, int64_t count, int64_t panels, Ahead ahead) {
    alignas(64) float sums[kMostTiles * kSums];
    switch (count * 8 + panels) {
      case 1 * 8 + 1: multiply_amx<1, 1>(operand_, tiles, ahead, sums); break;
      case 1 * 8 + 2: multiply_amx<1, 2>(operand_, tiles, ahead, sums); break;
      case 1 * 8 + 3: multiply_amx<1, 3>(operand_, tiles, ahead, sums); break;
      case 1 * 8 + 4: multiply_amx<1, 4>(operand_, tiles, ahead, sums); break;
      case 2 * 8 + 1: multiply_amx<2, 1>(operand_, tiles, ahead, sums); break;
      case 2 * 8 + 2: multiply_amx<2, 2>(operand_, tiles, ahead, sums); break;
      case 3 * 8 + 1: multiply_amx<3, 1>(operand_, tiles, ahead, sums); break;
      default: multiply_amx<4, 1>(operand_, tiles, ahead, sums);
    }
    const float* part = sums;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < panels; j += 2, part += 2 * kSums) {
        if (j + 1 < panels) {
          finish(lines_[j / 2], tiles[i], memory_.tables, part);
          continue;
        }
        finish(half_, tiles[i], memory_.tables, part);
        part -= kSums;
      }
  }

  const Step& step_;
  const Memory& memory_;
  Operand operand_;
  const int64_t panel_values_;
  const bool fetches_;
  const Tile* tiles_;
  LineEpilogue lines_[2];
  Epilogue half_; // of a panel that is multiplied without the other one of its line
};

inline void conv_amx(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
    int64_t last_panel) {
  AmxPart(step, memory).run(begin, end, first_panel, last_panel);
}

} // namespace resfast::network
