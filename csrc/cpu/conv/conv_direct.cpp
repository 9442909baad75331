// Direct 3x3 convolution in bfloat16 on AMX, without a transform: products are so cheap that data
// movement dominates. Weights: [panel of 32 outputs][row of taps][32 channels][tap of the
// row][pair] [output][2], padded with zeros, in the order in which the tiles read them.
//
// A thread lays out a few groups of images (conv_direct.h) and computes 32 positions by 32 outputs
// at a time, summed over all taps and channels in four tiles, followed by the epilogue.

#if defined(__x86_64__)

#include "conv_direct.h"
#include "weight_lanes.h"

namespace resfast {
namespace {

constexpr int64_t kOutputs = 32; // outputs per panel
constexpr int64_t kInputBytes = 640 * 1024, kWeightBytes = 896 * 1024; // at a time: a part of L2
constexpr int64_t kTile = 2 * 16 * kOutputs; // values in 16 pairs of a panel

int64_t panel_size(int64_t channels) { return 9 * round_up(channels, kChannels) * kOutputs; }
int64_t direct_size(int64_t outputs, int64_t channels) {
  return ceil_div(outputs, kOutputs) * panel_size(channels);
}

// Inputs of a group: [row][cell][image][channel], channels padded with zeros.
RESFAST_BF16 void lay_out(const ConvShape& shape, const Grid& grid, int64_t group, uint16_t* to) {
  const int64_t size = round_up(shape.channels, kChannels);
  for (int64_t image = 0; image < grid.images; ++image)
    grid.visit(
        shape, group * grid.images + image,
        [&](int64_t row, int64_t cell, const uint16_t* values) RESFAST_BF16 {
          uint16_t* place = to + ((row * grid.cells + cell) * grid.images + image) * size;
          for (int64_t channel = 0; channel < shape.channels; channel += kChannels)
            _mm512_store_si512(place + channel, load_channels(values, channel, shape.channels));
        });
}

// Sums [32, 32] of 32 positions of a row of results and one panel.
template <int kOutputTiles>
RESFAST_AMX void multiply_taps(
    const Grid& grid, const uint16_t* inputs, int64_t row, int64_t position, int64_t size,
    const uint16_t* weights, float* sums) {
  asm volatile("" ::: "memory"); // GCC does not know that a tile's load reads memory
  const int64_t stride = 2 * size; // bytes
  const int64_t shifts[3] = {0, grid.shift(1) * size, grid.shift(2) * size};
  using Block = amx::Sums<2, kOutputTiles>;
  Block::clear();
  for (int64_t r = 0; r < 3; ++r) {
    if (!grid.has_row(row, r)) continue;
    const uint16_t* from =
        inputs + (grid.input_row(row, r) * grid.cells * grid.images + position) * size;
    const uint16_t* panel = weights + r * 3 * size * kOutputs;
    for (int64_t channel = 0; channel < size; channel += kChannels)
      for (int64_t s = 0; s < 3; ++s, panel += kTile) {
        const uint16_t* a = from + shifts[s] + channel;
        Block::add(a, a + amx::kRows * size, stride, panel, 4 * kOutputs);
      }
  }
  Block::write(sums, 4 * kOutputs);
  asm volatile("" ::: "memory");
}

// Pixels of the result at 32 positions, -1 for images beyond the last.
struct Places {
  int64_t pixel[kPositions];

  Places(const ConvShape& shape, const Grid& grid, int64_t group, int64_t row, int64_t position) {
    for (int64_t i = 0; i < kPositions; ++i) pixel[i] = grid.pixel(shape, group, row, position + i);
  }
};

RESFAST_BF16 void finish_positions(
    const ConvShape& shape, const Places& places, int64_t output, const float* sums) {
  const __mmask16 mask = lane_mask(shape.outputs - output);
  const __mmask16 rest = output + kLanes < shape.outputs
      ? lane_mask(shape.outputs - output - kLanes) : __mmask16{0};
  for (int64_t i = 0; i < kPositions; ++i) {
    if (places.pixel[i] < 0) continue;
    const float* from = sums + i * kOutputs;
    finish(shape, places.pixel[i], output, mask, _mm512_load_ps(from));
    if (rest)
      finish(shape, places.pixel[i], output + kLanes, rest, _mm512_load_ps(from + kLanes));
  }
}

// Prefetches the memory of results and residuals while they are computed.
void prefetch(const ConvShape& shape, const Places& places, int64_t output) {
  for (const int64_t pixel : places.pixel) {
    if (pixel < 0) continue;
    __builtin_prefetch(shape.out + pixel * shape.outputs + output, 1, 2);
    if (shape.residual) __builtin_prefetch(shape.residual + pixel * shape.outputs + output, 0, 2);
  }
}

void direct_part(
    const ConvShape& shape, const Grid& grid, const uint16_t* packed, int64_t begin, int64_t end,
    int64_t panel_begin, int64_t panel_end) {
  const int64_t size = round_up(shape.channels, kChannels), panel = panel_size(shape.channels);
  const int64_t group_size = grid.input_positions() * size;
  const int64_t most_groups = std::clamp<int64_t>(kInputBytes / 2 / group_size, 1, end - begin);
  const int64_t most_panels = std::max<int64_t>(kWeightBytes / 2 / panel, 1);
  thread_local Workspace<uint16_t> inputs_memory;
  uint16_t* inputs = inputs_memory.get(most_groups * group_size);
  alignas(64) float sums[kPositions * kOutputs];
  const amx::Tiles tiles(true);
  auto compute = [&](int64_t group, const uint16_t* from, int64_t row, int64_t first, int64_t last) {
    for (int64_t position = 0; position < grid.positions(); position += kPositions) {
      const Places places(shape, grid, group, row, position);
      for (int64_t part = first; part < last; ++part) {
        const int64_t output = part * kOutputs;
        prefetch(shape, places, output);
        if (shape.outputs - output > kLanes)
          multiply_taps<2>(grid, from, row, position, size, packed + part * panel, sums);
        else
          multiply_taps<1>(grid, from, row, position, size, packed + part * panel, sums);
        finish_positions(shape, places, output, sums);
      }
    }
  };
  for (int64_t first = begin; first < end; first += most_groups) {
    const int64_t count = std::min(most_groups, end - first);
    for (int64_t i = 0; i < count; ++i) lay_out(shape, grid, first + i, inputs + i * group_size);
    for (int64_t part = panel_begin; part < panel_end; part += most_panels)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t row = 0; row < shape.rows; ++row)
          compute(
              first + i, inputs + i * group_size, row, part,
              std::min(panel_end, part + most_panels));
  }
}

// -- weights ---------------------------------------------------------------------------------------

// Packs a training weight: float32, read by `Lanes`.
template <class Lanes>
Tensor pack(const Weight& weight) {
  const Lanes shape{weight};
  const int64_t outputs = shape.outputs(), channels = shape.channels();
  Tensor packed = torch::stable::empty({direct_size(outputs, channels)}, ScalarType::BFloat16);
  auto* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  const int64_t groups = ceil_div(channels, kChannels), halves = 2 * ceil_div(outputs, kOutputs);
  share_all(halves, [&](int64_t begin, int64_t end) RESFAST_BF16 {
    Lanes from{weight};
    for (int64_t part = begin; part < end; ++part) {
      const int64_t output = part * kLanes;
      uint16_t* panel = to + part / 2 * panel_size(channels) + part % 2 * kOutputs;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t channel = group * kChannels;
        if (output < outputs) from.go_to(output, group);
        auto value = [&](int64_t at, int tap) RESFAST_BF16 {
          return output < outputs && at < channels ? words(from.load(output, at, tap))
                                                   : _mm512_setzero_si512();
        };
        for (int tap = 0; tap < 9; ++tap) {
          uint16_t* tile = panel + ((tap / 3 * groups + group) * 3 + tap % 3) * kTile;
          for (int64_t pair = 0; pair < amx::kPairs; ++pair)
            _mm512_storeu_si512(
                tile + pair * 2 * kOutputs,
                _mm512_or_si512(
                    value(channel + 2 * pair, tap),
                    _mm512_slli_epi32(value(channel + 2 * pair + 1, tap), 16)));
        }
      }
    }
  });
  return packed;
}

Tensor conv_direct_train_pack(const Tensor& weight, bool transposed) {
  check_amx();
  const Weight from = check_train_weight(weight);
  return transposed ? pack<TransposedLanes>(from) : pack<PlainLanes>(from);
}

Tensor conv_direct_pack(const Tensor& weight) {
  check_weight(weight);
  if (weight.size(2) != 3 || weight.size(3) != 3)
    fail("weight is ", shape_name(weight.sizes()), "; expected [K, C, 3, 3]");
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  const int64_t groups = ceil_div(channels, kChannels);
  Tensor packed = torch::stable::empty({direct_size(outputs, channels)}, ScalarType::BFloat16);
  const auto* from = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  std::fill(to, to + packed.numel(), uint16_t{0});
  for (int64_t output = 0; output < outputs; ++output) {
    uint16_t* panel = to + output / kOutputs * panel_size(channels) + output % kOutputs * 2;
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t tile = (tap / 3 * groups + channel / kChannels) * 3 + tap % 3;
        const int64_t pair = channel % kChannels / 2;
        panel[tile * kTile + pair * 2 * kOutputs + channel % 2] =
            from[(output * channels + channel) * 9 + tap];
      }
  }
  return packed;
}

void multiply_groups(const ConvShape& shape, const uint16_t* packed) {
  const Grid grid(shape, 1);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = ceil_div(shape.outputs, kOutputs);
  const bool by_panels = grid.groups < threads && panels > grid.groups;
  const int64_t count = by_panels ? panels : grid.groups;
  share_all(count, [&](int64_t a, int64_t b) {
    if (by_panels) direct_part(shape, grid, packed, 0, grid.groups, a, b);
    else direct_part(shape, grid, packed, a, b, 0, panels);
  });
}

Tensor conv_direct(
    const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
    int64_t activation, double negative_slope) {
  check_amx();
  check_geometry(geometry);
  return convolve(
      x, packed, bias, residual, geometry, activation, negative_slope,
      direct_size(geometry[0], geometry[1]), multiply_groups);
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("conv_direct_pack(Tensor weight) -> Tensor");
  m.def("conv_direct_train_pack(Tensor weight, bool transposed) -> Tensor");
  m.def(
      "conv_direct(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[] geometry, "
      "int activation, float negative_slope) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("conv_direct_pack", TORCH_BOX(&resfast::conv_direct_pack));
  m.impl("conv_direct_train_pack", TORCH_BOX(&resfast::conv_direct_train_pack));
  m.impl("conv_direct", TORCH_BOX(&resfast::conv_direct));
}

#endif
