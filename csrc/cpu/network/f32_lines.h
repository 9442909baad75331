// Lines of float32 and the steps that only copy, compare or add them; part of f32.h.
#pragma once

namespace resfast::network::RESFAST_F32_NAMESPACE {
namespace {

constexpr int kVector = static_cast<int>(kLanes) / kVectors; // values of a vector

struct Line {
  Vector part[kVectors];
};

template <class Make>
RESFAST_F32_INLINE Line line_from(Make make) {
  Line line;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) line.part[v] = make(v);
  return line;
}

RESFAST_F32_INLINE Line load_line(const float* from) {
  return line_from([&](int v) RESFAST_F32 { return load(from + v * kVector); });
}
RESFAST_F32_INLINE void store_line(float* to, const Line& line) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) store(to + v * kVector, line.part[v]);
}
// The first `count` values, zeros after them.
RESFAST_F32_INLINE Line load_first_line(const float* from, int64_t count) {
  return line_from([&](int v) RESFAST_F32 {
    return load_first(from + v * kVector, count - v * kVector);
  });
}
RESFAST_F32_INLINE Line operator+(const Line& a, const Line& b) {
  return line_from([&](int v) RESFAST_F32 { return a.part[v] + b.part[v]; });
}
RESFAST_F32_INLINE Line splat_line(float value) {
  return line_from([&](int) RESFAST_F32 { return splat(value); });
}

// Copies the first `count` values to float32 or, rounded, to bfloat16.
RESFAST_F32 inline void store_result(char* to, const Line& line, int64_t count, bool narrow) {
  if (narrow) {
    alignas(kLine) float values[kLanes];
    store_line(values, line);
    auto* out = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(values[i]);
    return;
  }
  for (int v = 0; v < kVectors; ++v)
    store_first(reinterpret_cast<float*>(to) + v * kVector, line.part[v], count - v * kVector);
}

// -- activations ---------------------------------------------------------------------------------

RESFAST_F32_INLINE Line relu(const Line& line) { // NaN stays NaN
  return line_from([&](int v) RESFAST_F32 { return maximum(splat(0.0f), line.part[v]); });
}

// exp to a few ulps, 0 below -104 and infinity from 89 on; NaN for NaN, the second of two values.
RESFAST_F32_INLINE Vector exponential(Vector x) {
  x = minimum(splat(89.0f), maximum(splat(-126.0f), x));
  const Vector n = rounded(x * splat(1.44269504f)), half = rounded(n * splat(0.5f));
  Vector r = multiply_add(n, splat(-0.693359375f), x);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  Vector value = splat(1.0f / 720);
  for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    value = multiply_add(value, r, splat(term));
  return value * power_of_two(half) * power_of_two(n - half); // 2^n may be too large
}

// x times the normal distribution function, whose error is at most 1e-7: formula 7.1.26 of Abramowitz
// and Stegun, "Handbook of Mathematical Functions". NaN at minus infinity, as torch's.
RESFAST_F32_INLINE Vector gelu(Vector x) {
  const Vector size = maximum(x, splat(0.0f) - x), scaled = size * splat(0.70710678f);
  const Vector t = splat(1.0f) / multiply_add(splat(0.3275911f), scaled, splat(1.0f));
  Vector tail = splat(1.061405429f);
  for (float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    tail = multiply_add(tail, t, splat(term));
  tail = splat(0.5f) * tail * t * exponential(splat(0.0f) - scaled * scaled);
  return x * where_less(x, splat(0.0f), tail, splat(1.0f) - tail);
}

RESFAST_F32_INLINE Vector relu6(Vector x) { // NaN stays NaN
  return minimum(splat(6.0f), maximum(splat(0.0f), x));
}

// Not inlined: the constants would be loaded outside of loops that do not need them. In place: GCC 12
// ends a function that returns a struct of one __m512 with vzeroupper, and most of it is lost.
RESFAST_F32 __attribute__((noinline)) inline void activate(
    Line& line, int64_t activation, float negative_slope) {
  switch (activation) {
    case kRelu: line = relu(line); break;
    case kLeakyRelu:
      line = line_from([&](int v) RESFAST_F32 {
        const Vector value = line.part[v];
        return where_less(value, splat(0.0f), value * splat(negative_slope), value);
      });
      break;
    case kSilu:
      line = line_from([&](int v) RESFAST_F32 {
        const Vector value = line.part[v];
        return value / (splat(1.0f) + exponential(splat(0.0f) - value));
      });
      break;
    case kGelu: line = line_from([&](int v) RESFAST_F32 { return gelu(line.part[v]); }); break;
    case kRelu6: line = line_from([&](int v) RESFAST_F32 { return relu6(line.part[v]); }); break;
    case kHardswish:
      line = line_from([&](int v) RESFAST_F32 {
        return line.part[v] * relu6(line.part[v] + splat(3.0f)) * splat(1.0f / 6);
      });
      break;
    case kHardsigmoid:
      line = line_from([&](int v) RESFAST_F32 {
        return relu6(line.part[v] + splat(3.0f)) * splat(1.0f / 6);
      });
      break;
    case kSigmoid:
      line = line_from([&](int v) RESFAST_F32 {
        const Vector value = line.part[v], power = exponential(splat(0.0f) - value);
        return where_nan(value, value, splat(1.0f) / (splat(1.0f) + power));
      });
      break;
    default: break;
  }
}

// -- the input -----------------------------------------------------------------------------------

// Line 0 of a block of a map.
inline float* lines_of(const Memory& memory, const Map& map, int64_t block) {
  return reinterpret_cast<float*>(memory.line(map.line + block * map.block_lines));
}

// Copies `count` values into lines of one pixel, filled up with zeros.
RESFAST_F32 inline void put(const float* values, int64_t count, float* line, int64_t block_values) {
  for (int64_t channel = 0; channel < count; channel += kLanes, line += block_values)
    store_line(line, load_first_line(values + channel, count - channel));
}

// Rows of an image of the item as float32 [rows, W, C], in `copy` where they are not in this order.
RESFAST_F32 inline const float* input_rows(
    const Step& step, const Memory& memory, int64_t image, int64_t first, int64_t last,
    float* copy) {
  const Input& input = memory.input;
  const int64_t at = (memory.first + image) * input.stride[0] + first * input.stride[2];
  if (input.lined_up) return static_cast<const float*>(input.values) + at;
  auto copy_from = [&](auto* values) RESFAST_F32 {
    for (int64_t row = 0; row < last - first; ++row)
      for (int64_t channel = 0; channel < step.channels; ++channel) {
        auto* from = values + at + row * input.stride[2] + channel * input.stride[1];
        float* to = copy + row * step.width * step.channels + channel;
        for (int64_t column = 0; column < step.width; ++column) {
          if constexpr (sizeof(*values) == sizeof(float))
            to[column * step.channels] = from[column * input.stride[3]];
          else to[column * step.channels] = from_bfloat16(from[column * input.stride[3]]);
        }
      }
  };
  if (input.wide) copy_from(static_cast<const float*>(input.values));
  else copy_from(static_cast<const uint16_t*>(input.values));
  return copy;
}

inline float* room_for_rows(const Step& step, int64_t rows) {
  thread_local Workspace<float> workspace;
  return workspace.get(rows * step.width * step.channels);
}

// The input's pixels as lines.
inline void enter(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  float* to = lines_of(memory, step.to, 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = step.first_image + i / step.height, row = i % step.height;
    if (image >= memory.images) return;
    const float* values = input_rows(step, memory, image, row, row + 1, room_for_rows(step, 1));
    for (int64_t column = 0; column < step.width; ++column)
      put(values + column * step.channels, step.channels,
          to + line_of(step.to, i / step.height, row, column) * kLanes,
          step.to.block_lines * kLanes);
  }
}

// The patches of a row of the result of one image, from the input's rows `first_row` on.
inline void patches_of_row(
    const Step& step, const Memory& memory, int64_t image, int64_t row, const float* values,
    int64_t first_row) {
  const int64_t row_values = step.kernel_w * step.channels, size = step.kernel_h * row_values;
  alignas(kLine) float patch[kMostPatch];
  const int64_t top = row * step.stride - step.padding_h;
  float* to = lines_of(memory, step.to, 0) + line_of(step.to, image, row, 0) * kLanes;
  for (int64_t column = 0; column < step.out_width; ++column, to += step.to.group * kLanes) {
    const int64_t left = column * step.stride - step.padding_w;
    const int64_t first = std::clamp<int64_t>(-left, 0, step.kernel_w);
    const int64_t last = std::clamp<int64_t>(step.width - left, first, step.kernel_w);
    for (int64_t r = 0; r < step.kernel_h; ++r) {
      float* part = patch + r * row_values;
      const bool there = top + r >= 0 && top + r < step.height && first < last;
      if (!there || last - first < step.kernel_w) std::fill(part, part + row_values, 0.0f);
      if (!there) continue;
      const float* from =
          values + ((top + r - first_row) * step.width + left + first) * step.channels;
      std::copy(from, from + (last - first) * step.channels, part + first * step.channels);
    }
    put(patch, size, to, step.to.block_lines * kLanes);
  }
}

// The patches of the input that a convolution of few channels multiplies, as lines: [R, S, C].
inline void patches(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t image = begin / step.out_height, row = begin % step.out_height;
    if (step.first_image + image >= memory.images) return;
    const int64_t last_row = std::min(step.out_height, row + end - begin);
    const int64_t top = row * step.stride - step.padding_h;
    const int64_t bottom = (last_row - 1) * step.stride - step.padding_h + step.kernel_h;
    const int64_t first = std::clamp<int64_t>(top, 0, step.height);
    const int64_t last = std::clamp<int64_t>(bottom, first, step.height);
    const float* values = input_rows(
        step, memory, step.first_image + image, first, last, room_for_rows(step, last - first));
    for (int64_t i = row; i < last_row; ++i) patches_of_row(step, memory, image, i, values, first);
    begin += last_row - row;
  }
}

// -- pools ---------------------------------------------------------------------------------------

// The larger value, or NaN where either is.
RESFAST_F32_INLINE Line larger(const Line& a, const Line& b) {
  return line_from([&](int v) RESFAST_F32 {
    return where_nan(a.part[v], a.part[v], maximum(a.part[v], b.part[v]));
  });
}

// The largest value of each window, or the mean, for windows that are inside of the map.
template <bool kMean>
RESFAST_F32 void pool(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  const Vector count = splat(static_cast<float>(step.kernel_h * step.kernel_w));
  for (int64_t block = 0; block < step.blocks; ++block) {
    const float* from = lines_of(memory, step.from, block);
    float* to = lines_of(memory, step.to, block);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / step.out_height, row = i % step.out_height;
      const int64_t top = row * step.stride - step.padding_h;
      const int64_t bottom = std::min(top + step.kernel_h, step.height);
      const RowLines written(step.to, image, row);
      for (int64_t column = 0; column < step.out_width; ++column) {
        const int64_t left = column * step.stride - step.padding_w;
        const int64_t right = std::min(left + step.kernel_w, step.width);
        Line value = splat_line(kMean ? 0.0f : -INFINITY);
        for (int64_t y = std::max<int64_t>(top, 0); y < bottom; ++y) {
          const RowLines read(step.from, image, y);
          for (int64_t x = std::max<int64_t>(left, 0); x < right; ++x) {
            const Line next = load_line(from + read.at(x) * kLanes);
            value = kMean ? value + next : larger(value, next);
          }
        }
        if (kMean) value = line_from([&](int v) RESFAST_F32 { return value.part[v] / count; });
        store_line(to + written.at(column) * kLanes, value);
      }
    }
  }
}

// The means of an image's map, [K] and zeros up to a whole line.
RESFAST_F32 inline void means_of(
    const Step& step, const Memory& memory, int64_t image, float* means) {
  const Vector count = splat(static_cast<float>(step.height * step.width));
  for (int64_t block = 0; block < step.blocks; ++block, means += kLanes) {
    const float* from = lines_of(memory, step.from, block);
    Line sum = splat_line(0.0f);
    for (int64_t y = 0; y < step.height; ++y) {
      const RowLines read(step.from, image, y);
      for (int64_t x = 0; x < step.width; ++x)
        sum = sum + load_line(from + read.at(x) * kLanes);
    }
    store_line(means, line_from([&](int v) RESFAST_F32 { return sum.part[v] / count; }));
  }
}

// Means of whole maps, as maps of one pixel or the result of the plan.
RESFAST_F32 inline void mean(const Step& step, const Memory& memory, int64_t begin, int64_t end) {
  thread_local Workspace<float> workspace;
  float* means = workspace.get(step.blocks * kLanes);
  const int64_t bytes = memory.wide_result ? sizeof(float) : sizeof(uint16_t);
  for (int64_t image = begin; image < end; ++image) {
    if (step.first_image + image >= memory.images) return;
    means_of(step, memory, image, means);
    if (step.to.line >= 0) {
      for (int64_t block = 0; block < step.blocks; ++block)
        store_line(lines_of(memory, step.to, block) + line_of(step.to, image, 0, 0) * kLanes,
                   load_line(means + block * kLanes));
      continue;
    }
    char* result = static_cast<char*>(memory.result) +
        (step.first_image + image) * step.outputs * bytes;
    for (int64_t channel = 0; channel < step.outputs; channel += kLanes)
      store_result(result + channel * bytes, load_line(means + channel),
                   std::min(kLanes, step.outputs - channel), !memory.wide_result);
  }
}

// A linear layer in float32 of the means of whole maps: outputs `first` to `last`.
RESFAST_F32 inline void head(
    const Step& step, const Memory& memory, int64_t begin, int64_t end, int64_t first,
    int64_t last) {
  thread_local Workspace<float> workspace;
  const int64_t size = step.blocks * kLanes;
  float* means = workspace.get((end - begin) * size);
  end = std::min(end, memory.images - step.first_image);
  for (int64_t image = begin; image < end; ++image)
    means_of(step, memory, image, means + (image - begin) * size);
  for (int64_t output = first; output < last; ++output) {
    const float* weights = memory.head + output * step.channels;
    for (int64_t image = begin; image < end; ++image) {
      const float* values = means + (image - begin) * size;
      Line sum = splat_line(0.0f);
      for (int64_t channel = 0; channel < step.channels; channel += kLanes) {
        const Line w = load_first_line(weights + channel, step.channels - channel);
        const Line x = load_line(values + channel);
        sum = line_from([&](int v) RESFAST_F32 {
          return multiply_add(w.part[v], x.part[v], sum.part[v]);
        });
      }
      alignas(kLine) float parts[kLanes];
      store_line(parts, sum);
      float total = 0;
      for (float part : parts) total += part;
      static_cast<float*>(memory.result)[(step.first_image + image) * step.outputs + output] =
          total + (memory.head_bias ? memory.head_bias[output] : 0.0f);
    }
  }
}

} // namespace
} // namespace resfast::network::RESFAST_F32_NAMESPACE
