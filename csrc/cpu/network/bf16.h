// The steps of a plan on lines of bfloat16, for AVX512-BF16 and AMX.
#pragma once

#include "conv_amx.h"
#include "depthwise.h"
#include "gathered.h"
#include "kernels.h"
#include "pointwise.h"
#include "winograd.h"

namespace resfast::network {
namespace {

void conv(const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first_panel,
          int64_t last_panel) {
  const auto run = amx::supported() ? conv_amx : conv_avx512;
  run(step, memory, begin, end, first_panel, last_panel);
}

// Copies `count` values into lines of one pixel, filled up with zeros.
RESFAST_BF16 void put(
    const uint16_t* values, int64_t count, uint16_t* line, int64_t block_values) {
  for (int64_t channel = 0; channel < count; channel += kBlock, line += block_values) {
    const __mmask32 mask = lane_mask32(count - channel);
    _mm512_store_si512(line, _mm512_maskz_loadu_epi16(mask, values + channel));
  }
}

// For each of three lines of interleaved values: which of the lanes of two channels a lane is from (those
// of the second count from 32 on), and which of these and of the third channel.
struct Interleaving {
  alignas(kLine) uint16_t two[3][kBlock], three[3][kBlock];

  constexpr Interleaving() : two{}, three{} {
    for (int line = 0; line < 3; ++line)
      for (int lane = 0; lane < kBlock; ++lane) {
        const int value = line * kBlock + lane, pixel = value / 3, channel = value % 3;
        two[line][lane] = pixel + (channel == 1 ? kBlock : 0);
        three[line][lane] = channel == 2 ? kBlock + pixel : lane;
      }
  }
};

// A row [3][width] of float32 as bfloat16 [width][3].
RESFAST_BF16 void interleave(
    const float* from, int64_t channel_values, int64_t width, uint16_t* to) {
  static constexpr Interleaving kFrom;
  for (int64_t column = 0; column < width; column += kBlock, from += kBlock) {
    const int64_t count = std::min(kBlock, width - column);
    __m512i channels[3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const float* values = from + i * channel_values;
      const __m512 low = _mm512_maskz_loadu_ps(lane_mask(count), values);
      const __m512 high = _mm512_maskz_loadu_ps(
          count > kTile ? lane_mask(count - kTile) : 0, values + kTile);
      channels[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i, to += kBlock) {
      const __m512i two = _mm512_permutex2var_epi16(
          channels[0], _mm512_load_si512(kFrom.two[i]), channels[1]);
      const __m512i three = _mm512_permutex2var_epi16(
          two, _mm512_load_si512(kFrom.three[i]), channels[2]);
      const int64_t there = 3 * count - i * kBlock;
      if (there >= kBlock) _mm512_storeu_si512(to, three);
      else if (there > 0) _mm512_mask_storeu_epi16(to, lane_mask32(there), three);
    }
  }
}

// Rows of an image of the item as bfloat16 [rows, W, C], in `copy` where they are not in this order.
RESFAST_BF16 const uint16_t* input_rows(
    const Step& step, const Memory& memory, int64_t image, int64_t first, int64_t last,
    uint16_t* copy) {
  const Input& input = memory.input;
  const int64_t at = (memory.first + image) * input.stride[0] + first * input.stride[2];
  if (input.lined_up) return static_cast<const uint16_t*>(input.values) + at;
  if (input.wide && step.channels == 3 && input.stride[3] == 1) {
    const float* from = static_cast<const float*>(input.values) + at;
    for (int64_t row = 0; row < last - first; ++row)
      interleave(from + row * input.stride[2], input.stride[1], step.width,
                 copy + row * step.width * 3);
    return copy;
  }
  auto copy_from = [&](auto* values) {
    for (int64_t row = 0; row < last - first; ++row)
      for (int64_t channel = 0; channel < step.channels; ++channel) {
        auto* from = values + at + row * input.stride[2] + channel * input.stride[1];
        uint16_t* to = copy + row * step.width * step.channels + channel;
        for (int64_t column = 0; column < step.width; ++column) {
          if constexpr (sizeof(*values) == sizeof(float))
            to[column * step.channels] = to_bfloat16(from[column * input.stride[3]]);
          else to[column * step.channels] = from[column * input.stride[3]];
        }
      }
  };
  if (input.wide) copy_from(static_cast<const float*>(input.values));
  else copy_from(static_cast<const uint16_t*>(input.values));
  return copy;
}

uint16_t* room_for_rows(const Step& step, int64_t rows) {
  thread_local Workspace<uint16_t> workspace;
  return workspace.get(rows * step.width * step.channels);
}

// The input's pixels as lines.
void enter(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  auto* to = reinterpret_cast<uint16_t*>(memory.line(step.to.line));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = step.first_image + i / step.height, row = i % step.height;
    if (image >= memory.images) return;
    const uint16_t* values =
        input_rows(step, memory, image, row, row + 1, room_for_rows(step, 1));
    for (int64_t column = 0; column < step.width; ++column)
      put(values + column * step.channels, step.channels,
          to + line_of(step.to, i / step.height, row, column) * kBlock,
          step.to.block_lines * kBlock);
  }
}

// The patches of rows of the result of one image, from the input's rows `first_row` on.
RESFAST_BF16 void patches_of_row(
    const Step& step, const Memory& memory, int64_t image, int64_t row, const uint16_t* values,
    int64_t first_row) {
  const int64_t row_values = step.kernel_w * step.channels; // at most kBlock
  const int64_t size = step.kernel_h * row_values;
  alignas(kLine) uint16_t patch[kMostPatch + kBlock]; // rows are written as whole lines
  const int64_t top = row * step.stride - step.padding_h;
  auto* to = reinterpret_cast<uint16_t*>(memory.line(step.to.line)) +
      line_of(step.to, image, row, 0) * kBlock;
  for (int64_t column = 0; column < step.out_width; ++column, to += step.to.group * kBlock) {
    const int64_t left = column * step.stride - step.padding_w;
    const int64_t first = std::clamp<int64_t>(-left, 0, step.kernel_w);
    const int64_t last = std::clamp<int64_t>(step.width - left, first, step.kernel_w);
    const __mmask32 inside =
        lane_mask32(last * step.channels) & ~lane_mask32(first * step.channels);
    const uint16_t* from = values + ((top - first_row) * step.width + left) * step.channels;
    __m512i line = _mm512_setzero_si512(); // stores with masks are slow
    for (int64_t r = 0; r < step.kernel_h; ++r, from += step.width * step.channels) {
      const __mmask32 lanes = top + r >= 0 && top + r < step.height ? inside : 0;
      const int64_t at = r * row_values;
      if (size <= kBlock) // the row's values, in the lanes from `at` on
        line = _mm512_or_si512(line, _mm512_maskz_loadu_epi16(lanes << at, from - at));
      else _mm512_storeu_si512(patch + at, _mm512_maskz_loadu_epi16(lanes, from));
    }
    if (size <= kBlock) _mm512_store_si512(to, line);
    else put(patch, size, to, step.to.block_lines * kBlock);
  }
}

// The patches of the input that a convolution of few channels multiplies, as lines: [R, S, C].
void patches(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t image = begin / step.out_height, row = begin % step.out_height;
    if (step.first_image + image >= memory.images) return;
    const int64_t last_row = std::min(step.out_height, row + end - begin);
    const int64_t top = row * step.stride - step.padding_h;
    const int64_t bottom = (last_row - 1) * step.stride - step.padding_h + step.kernel_h;
    const int64_t first = std::clamp<int64_t>(top, 0, step.height);
    const int64_t last = std::clamp<int64_t>(bottom, first, step.height);
    const uint16_t* values = input_rows(
        step, memory, step.first_image + image, first, last, room_for_rows(step, last - first));
    for (int64_t i = row; i < last_row; ++i) patches_of_row(step, memory, image, i, values, first);
    begin += last_row - row;
  }
}

// The larger value, or NaN where either is.
RESFAST_BF16 __m512 larger(__m512 a, __m512 b) {
  const __mmask16 taken =
      _mm512_cmp_ps_mask(b, a, _CMP_GT_OQ) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(a, taken, b);
}

// The largest value of each window, or the mean, for windows that are inside of the map.
template <bool kMean>
RESFAST_BF16 void pool(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  const __m512 count = _mm512_set1_ps(static_cast<float>(step.kernel_h * step.kernel_w));
  for (int64_t block = 0; block < step.blocks; ++block) {
    const auto* from = reinterpret_cast<const uint16_t*>(
        memory.line(step.from.line + block * step.from.block_lines));
    auto* to = reinterpret_cast<uint16_t*>(memory.line(step.to.line + block * step.to.block_lines));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / step.out_height, row = i % step.out_height;
      const int64_t top = row * step.stride - step.padding_h;
      const int64_t bottom = std::min(top + step.kernel_h, step.height);
      const RowLines written(step.to, image, row);
      for (int64_t column = 0; column < step.out_width; ++column) {
        const int64_t left = column * step.stride - step.padding_w;
        const int64_t right = std::min(left + step.kernel_w, step.width);
        __m512 low = _mm512_set1_ps(kMean ? 0.0f : -INFINITY), high = low;
        for (int64_t y = std::max<int64_t>(top, 0); y < bottom; ++y) {
          const RowLines read(step.from, image, y);
          for (int64_t x = std::max<int64_t>(left, 0); x < right; ++x) {
            const uint16_t* values = from + read.at(x) * kBlock;
            const __m512 next_low = widened(values), next_high = widened(values + kTile);
            low = kMean ? _mm512_add_ps(low, next_low) : larger(low, next_low);
            high = kMean ? _mm512_add_ps(high, next_high) : larger(high, next_high);
          }
        }
        if (kMean) low = _mm512_div_ps(low, count), high = _mm512_div_ps(high, count);
        store_pair(to + written.at(column) * kBlock, low, high);
      }
    }
  }
}

// The means of an image's map, [K] as float32 rounded to bfloat16.
RESFAST_BF16 void means_of(const Step& step, const Memory& memory, int64_t image, float* means) {
  const __m512 count = _mm512_set1_ps(static_cast<float>(step.height * step.width));
  auto rounded = [&](__m512 sum) RESFAST_BF16 {
    const __m512i bits =
        _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_div_ps(sum, count)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  };
  for (int64_t block = 0; block < step.blocks; ++block, means += kBlock) {
    const auto* from = reinterpret_cast<const uint16_t*>(
        memory.line(step.from.line + block * step.from.block_lines));
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t y = 0; y < step.height; ++y) {
      const RowLines read(step.from, image, y);
      for (int64_t x = 0; x < step.width; ++x) {
        const uint16_t* values = from + read.at(x) * kBlock;
        low = _mm512_add_ps(low, widened(values));
        high = _mm512_add_ps(high, widened(values + kTile));
      }
    }
    _mm512_storeu_ps(means, rounded(low)), _mm512_storeu_ps(means + kTile, rounded(high));
  }
}

// Means of whole maps, as maps of one pixel or the result of the plan.
RESFAST_BF16 void mean(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  thread_local Workspace<float> workspace;
  float* means = workspace.get(step.blocks * kBlock);
  for (int64_t image = begin; image < end; ++image) {
    if (step.first_image + image >= memory.images) return;
    means_of(step, memory, image, means);
    if (step.to.line >= 0) {
      for (int64_t block = 0; block < step.blocks; ++block) {
        auto* to = reinterpret_cast<uint16_t*>(
            memory.line(step.to.line + block * step.to.block_lines));
        const float* values = means + block * kBlock;
        store_pair(to + line_of(step.to, image, 0, 0) * kBlock, _mm512_loadu_ps(values),
                   _mm512_loadu_ps(values + kTile));
      }
      continue;
    }
    uint16_t* result = static_cast<uint16_t*>(memory.result) +
        (step.first_image + image) * step.outputs;
    for (int64_t channel = 0; channel < step.outputs; channel += kTile)
      store_bf16(lane_mask(step.outputs - channel), result + channel,
                 _mm512_loadu_ps(means + channel));
  }
}

// A linear layer in float32 of the means of whole maps: outputs `first` to `last`.
RESFAST_BF16 void head(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first,
    int64_t last) {
  thread_local Workspace<float> workspace;
  const int64_t size = step.blocks * kBlock;
  float* means = workspace.get((end - begin) * size);
  end = std::min(end, memory.images - step.first_image);
  for (int64_t image = begin; image < end; ++image)
    means_of(step, memory, image, means + (image - begin) * size);
  for (int64_t output = first; output < last; ++output) {
    const float* weights = memory.head + output * step.channels;
    for (int64_t image = begin; image < end; ++image) {
      const float* values = means + (image - begin) * size;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t channel = 0; channel < step.channels; channel += kTile)
        sum = _mm512_fmadd_ps(
            _mm512_maskz_loadu_ps(lane_mask(step.channels - channel), weights + channel),
            _mm512_loadu_ps(values + channel), sum);
      static_cast<float*>(memory.result)[(step.first_image + image) * step.outputs + output] =
          _mm512_reduce_add_ps(sum) + (memory.head_bias ? memory.head_bias[output] : 0.0f);
    }
  }
}

constexpr Kernels kBf16{
    conv, winograd, gathered, head, depthwise, patches, enter, pool<false>, pool<true>, mean, pointwise};

} // namespace
} // namespace resfast::network
