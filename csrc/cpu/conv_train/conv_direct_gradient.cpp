// Direct weight gradient of a 3x3 convolution in bfloat16 on AMX, without a transform:
//
//   dw[k][r][s][c] = sum over images n, rows i, columns j of
//                    dy[n][i][j][k] * x[n][i * stride + r - padding][j * stride + s - padding][c],
//
// one matrix product over positions for each tap. Images are laid out as described in
// conv_direct.h, so that a tile sums over positions of one row, and a pair is two images at the
// same pixel.

#if defined(__x86_64__)

#include "../conv/conv_direct.h"
#include "../conv/weight_lanes.h"

namespace resfast {
namespace {

constexpr int64_t kBlock = 32; // outputs and channels of a block of sums: two tiles per dimension
constexpr int64_t kBlockSums = kBlock * kBlock;
constexpr int64_t kAtOnce = 8; // tiles of positions before the next tap: a part of L1
constexpr int64_t kChunkBytes = 1024 * 1024; // of operands: a part of L2

// Groups of images are distributed over lanes with their own sums, which are added at the end. The
// number of lanes depends only on the shape, so results do not depend on the number of threads.
constexpr int64_t kMostLanes = 8, kLeastLane = 4096; // lanes; positions per lane
constexpr int64_t kLaneSumsBytes = 24 * 1024 * 1024; // of all lanes

// Inputs in tile order: [block of channels][group][row][cell][pair of images][channel][2].
struct Inputs {
  uint16_t* values;
  int64_t channels, row_pairs, pairs; // channels; pairs per row; pairs in all groups

  // Channels of a block: 32, or 16 if that is enough for the rest.
  int64_t width(int64_t block) const {
    return channels - block * kBlock > kLanes ? kBlock : kLanes;
  }
  uint16_t* at(int64_t block, int64_t row, int64_t pair) const {
    return values + (block * pairs * kBlock + (row * row_pairs + pair) * width(block)) * 2;
  }
};

// Two images of a group; `first_row` is the first one of the group.
RESFAST_BF16 void lay_out_pair(
    const ConvShape& shape, const Grid& grid, int64_t image, int64_t pair, int64_t first_row,
    const Inputs& to) {
  alignas(64) static constexpr uint16_t kLow[32] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t next = shape.height * shape.width * shape.channels;
  const bool both = image + 1 < shape.batch;
  grid.visit(
      shape, image, [&](int64_t row, int64_t cell, const uint16_t* even) RESFAST_BF16 {
        const uint16_t* odd = even && both ? even + next : nullptr;
        for (int64_t channel = 0; channel < shape.channels; channel += kBlock) {
          const __m512i a = load_channels(even, channel, shape.channels);
          const __m512i b = load_channels(odd, channel, shape.channels);
          const int64_t block = channel / kBlock;
          uint16_t* place = to.at(block, first_row + row, cell * grid.images / 2 + pair);
          _mm512_store_si512(place, _mm512_permutex2var_epi16(a, low, b));
          if (to.width(block) == kBlock)
            _mm512_store_si512(place + kBlock, _mm512_permutex2var_epi16(a, high, b));
        }
      });
}

// Gradients in tile order: [16 outputs][row of all groups][step][output][32 positions].
struct Gradients {
  uint16_t* values;
  int64_t steps, row_steps; // in all rows; per row

  uint16_t* at(int64_t sixteen, int64_t step) const {
    return values + (sixteen * steps + step) * kLanes * kPositions;
  }
};

// Lays out a row of a group as row `to_row`.
RESFAST_BF16 void lay_out_gradients(
    const ConvShape& shape, const Grid& grid, const uint16_t* grad, int64_t group, int64_t row,
    int64_t to_row, const Gradients& to) {
  for (int64_t step = 0; step < to.row_steps; ++step) {
    const uint16_t* from[kPositions];
    for (int64_t i = 0; i < kPositions; ++i) {
      const int64_t pixel = grid.pixel(shape, group, row, step * kPositions + i);
      from[i] = pixel < 0 ? nullptr : grad + pixel * shape.outputs;
    }
    for (int64_t output = 0; output < shape.outputs; output += kLanes) {
      const __mmask16 mask = lane_mask(shape.outputs - output);
      auto word = [&](const uint16_t* values) RESFAST_BF16 {
        return values ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values + output))
                      : _mm512_setzero_si512();
      };
      __m512 pairs[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        pairs[i] = _mm512_castsi512_ps(
            _mm512_or_si512(word(from[2 * i]), _mm512_slli_epi32(word(from[2 * i + 1]), 16)));
      transpose(pairs);
      uint16_t* place = to.at(output / kLanes, to_row * to.row_steps + step);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) _mm512_store_ps(place + i * kPositions, pairs[i]);
    }
  }
}

// sums[output][channel] += the products at the positions of some rows of results for which row r of
// the taps is inside the image, for kRowTiles * 16 outputs and kOutputTiles * 16 channels.
template <int kRowTiles, int kOutputTiles>
RESFAST_AMX void multiply_rows(
    const ConvShape& shape, const Grid& grid, const Gradients& gradients, const Inputs& inputs,
    int64_t sixteen, int64_t block, int64_t begin, int64_t end, int64_t r, int64_t s, float* sums) {
  using Block = amx::Sums<kRowTiles, kOutputTiles>;
  constexpr int64_t kStride = 64 * kOutputTiles, kSums = 4 * kBlock; // bytes
  constexpr int64_t kStep = kLanes * kPositions;
  Block::read(sums, kSums);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t group = row / shape.rows, at = row % shape.rows;
    if (!grid.has_row(at, r)) continue;
    const uint16_t* upper = gradients.at(sixteen, row * gradients.row_steps);
    const uint16_t* lower = upper + gradients.steps * kStep;
    const uint16_t* from =
        inputs.at(block, group * grid.height + grid.input_row(at, r), grid.shift(s) / 2);
    for (int64_t step = 0; step < gradients.row_steps; ++step) {
      Block::add(upper, lower, 64, from, kStride);
      from += kStride / 2 * amx::kPairs, upper += kStep, lower += kStep;
    }
  }
  Block::write(sums, kSums);
}

// All taps of one block of outputs and one of channels: sums[tap][kBlockSums].
void multiply_block(
    const ConvShape& shape, const Grid& grid, const Gradients& gradients, const Inputs& inputs,
    int64_t row_block, int64_t block, int64_t rows, float* sums) {
  const bool wide = inputs.width(block) == kBlock;
  const bool tall = shape.outputs - row_block * kBlock > kLanes;
  const int64_t at_once = std::max<int64_t>(1, kAtOnce / gradients.row_steps);
  auto multiply = wide && tall ? multiply_rows<2, 2>
      : wide                   ? multiply_rows<1, 2>
      : tall                   ? multiply_rows<2, 1>
                               : multiply_rows<1, 1>;
  asm volatile("" ::: "memory"); // GCC does not know that a tile's load reads memory
  for (int64_t first = 0; first < rows; first += at_once)
    for (int64_t tap = 0; tap < 9; ++tap)
      multiply(
          shape, grid, gradients, inputs, 2 * row_block, block, first,
          std::min(rows, first + at_once), tap / 3, tap % 3, sums + tap * kBlockSums);
}

// -- lanes and threads -----------------------------------------------------------------------------

struct Sums {
  float* values; // [lane][block of outputs][block of channels][tap][32][32]
  int64_t rows, blocks, lane_stride, lanes;

  float* at(int64_t lane, int64_t row, int64_t block) const {
    return values + lane * lane_stride + (row * blocks + block) * 9 * kBlockSums;
  }
};

// Adds groups [begin, end) to the sums. `share(count, unit, part)` calls part(first, last) for all
// of `count`, on one or more threads.
template <class Share>
void add_groups(
    const ConvShape& shape, const Grid& grid, const uint16_t* grad, int64_t begin, int64_t end,
    const Sums& sums, int64_t lane, Share share) {
  const int64_t sixteens = 2 * sums.rows, group_pairs = grid.input_positions() / 2;
  const int64_t row_steps = grid.positions() / kPositions, group_steps = shape.rows * row_steps;
  const int64_t group_inputs = sums.blocks * group_pairs * kBlock * 2; // values
  const int64_t group_gradients = sixteens * group_steps * kLanes * kPositions;
  const int64_t chunk = std::clamp<int64_t>(
      kChunkBytes / 2 / (group_inputs + group_gradients), 1, std::max<int64_t>(end - begin, 1));
  thread_local Workspace<uint16_t> inputs_memory, gradients_memory;
  Inputs inputs{
      inputs_memory.get(chunk * group_inputs), shape.channels, grid.cells * grid.images / 2,
      chunk * group_pairs};
  Gradients gradients{
      gradients_memory.get(chunk * group_gradients), chunk * group_steps, row_steps};
  const int64_t pairs = grid.images / 2;
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t count = std::min(chunk, end - first), rows = count * shape.rows;
    share(count * pairs, 1, [&](int64_t from, int64_t until) {
      for (int64_t i = from; i < until; ++i)
        lay_out_pair(
            shape, grid, (first + i / pairs) * grid.images + 2 * (i % pairs), i % pairs,
            i / pairs * grid.height, inputs);
    });
    share(rows, 1, [&](int64_t from, int64_t until) {
      for (int64_t row = from; row < until; ++row)
        lay_out_gradients(
            shape, grid, grad, first + row / shape.rows, row % shape.rows, row, gradients);
    });
    share(sums.rows * sums.blocks, 1, [&](int64_t from, int64_t until) {
      const amx::Tiles tiles(true);
      for (int64_t part = from; part < until; ++part) {
        const int64_t block = part / sums.rows, row = part % sums.rows;
        float* to = sums.at(lane, row, block);
        if (first == begin) std::fill(to, to + 9 * kBlockSums, 0.0f);
        multiply_block(shape, grid, gradients, inputs, row, block, rows, to);
      }
    });
  }
}

// dw [K, 3, 3, C] of some outputs.
RESFAST_BF16 void add_lanes(
    const ConvShape& shape, const Sums& sums, int64_t begin, int64_t end, float* to) {
  for (int64_t output = begin; output < end; ++output)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t channel = 0; channel < shape.channels; channel += kLanes) {
        const float* from = sums.at(0, output / kBlock, channel / kBlock) + tap * kBlockSums +
            output % kBlock * kBlock + channel % kBlock;
        __m512 sum = _mm512_load_ps(from);
        for (int64_t lane = 1; lane < sums.lanes; ++lane)
          sum += _mm512_load_ps(from + lane * sums.lane_stride);
        _mm512_mask_storeu_ps(
            to + (output * 9 + tap) * shape.channels + channel,
            lane_mask(shape.channels - channel), sum);
      }
}

void weight_gradient(const ConvShape& shape, const uint16_t* grad, float* to) {
  const Grid grid(shape, 2);
  Sums sums{};
  sums.rows = ceil_div(shape.outputs, kBlock), sums.blocks = ceil_div(shape.channels, kBlock);
  sums.lane_stride = sums.rows * sums.blocks * 9 * kBlockSums;
  const int64_t bytes = sums.lane_stride * int64_t{sizeof(float)};
  const int64_t positions = grid.groups * shape.rows * grid.positions();
  const int64_t most =
      std::min({kMostLanes, positions / kLeastLane, grid.groups, kLaneSumsBytes / bytes});
  for (sums.lanes = 1; 2 * sums.lanes <= most;) sums.lanes *= 2;
  thread_local Workspace<float> memory;
  sums.values = memory.get(sums.lanes * sums.lane_stride);
  deal_lanes(sums.lanes, [&](int64_t lane, auto share) {
    add_groups(
        shape, grid, grad, lane * grid.groups / sums.lanes, (lane + 1) * grid.groups / sums.lanes,
        sums, lane, share);
  });
  share_all(
      shape.outputs, [&](int64_t begin, int64_t end) { add_lanes(shape, sums, begin, end, to); });
}

Tensor conv_direct_weight_gradient(
    const Tensor& x, const Tensor& grad, int64_t stride, int64_t padding) {
  check_amx();
  const ConvShape shape = weight_gradient_shape(x, grad, stride, padding);
  Tensor result = new_weight_gradient(shape);
  weight_gradient(
      shape, static_cast<const uint16_t*>(grad.const_data_ptr()),
      static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("conv_direct_weight_gradient(Tensor x, Tensor grad, int stride, int padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("conv_direct_weight_gradient", TORCH_BOX(&resfast::conv_direct_weight_gradient));
}

#endif
