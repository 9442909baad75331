// A first convolution whose weight is not trained, its bias and activation in one pass, and the
// gradient of the bias, in bfloat16 on AVX-512. Documentation: resfast/ops/frozen_conv/op.py.
//
// An image becomes a float32 copy with its zeros around it, small enough for L1 or L2. A row of
// taps (kernel columns x channels) then is contiguous, and its products need no shuffle: one value
// of a pixel times a vector of 16 filters. Sums over pixels are float32 per image and double over
// images in order, so results do not depend on the number of threads.

#if defined(__x86_64__)

#include <vector>

#include "../conv/act_gradient.h"

namespace resfast {
namespace {

constexpr int64_t kPixels = 4; // computed at once

struct FrozenConv {
  int64_t batch, height, width, channels; // of x
  int64_t filters, side, before; // side: of the kernel
  int64_t rows, columns; // of the result
  float negative_slope;
  const uint16_t* x; // [N, H, W, C]
  std::vector<float> weight; // [taps][padded filters]
  std::vector<float> bias; // [padded filters]

  int64_t padded() const { return round_up(filters, kLanes); }
  int64_t line() const { return side * channels; } // taps of a kernel row
  // Columns of the float32 copy: the last pixels computed at once may be beyond the result.
  int64_t copy_columns() const { return round_up(columns, kPixels) + side - 1; }
  int64_t copy_size() const { return (rows + side - 1) * copy_columns() * channels; }
};

FrozenConv checked(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t before, int64_t behind,
    int64_t activation, double negative_slope) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  check_activation(activation);
  check_map("x", x, {-1, -1, -1, -1});
  if (weight.scalar_type() != ScalarType::Float || weight.dim() != 4 || !weight.is_cpu() ||
      weight.numel() == 0 || weight.size(1) != x.size(1) || weight.size(2) != weight.size(3))
    fail("weight is ", dtype_name(weight.scalar_type()), " ", shape_name(weight.sizes()),
         "; expected torch.float32 [K, ", x.size(1), ", R, R] on the CPU");
  if (bias.scalar_type() != ScalarType::Float || bias.dim() != 1 ||
      bias.size(0) != weight.size(0) || !bias.is_contiguous() || !bias.is_cpu())
    fail("bias is ", dtype_name(bias.scalar_type()), " ", shape_name(bias.sizes()),
         "; expected torch.float32 [", weight.size(0), "], contiguous, on the CPU");
  if (before < 0 || behind < 0) fail("padding ", before, " and ", behind, "; expected at least 0");
  FrozenConv conv{};
  conv.batch = x.size(0), conv.channels = x.size(1);
  conv.height = x.size(2), conv.width = x.size(3);
  conv.filters = weight.size(0), conv.side = weight.size(2), conv.before = before;
  conv.rows = conv.height + before + behind - conv.side + 1;
  conv.columns = conv.width + before + behind - conv.side + 1;
  if (conv.rows < 1 || conv.columns < 1) fail("x is smaller than the kernel");
  conv.negative_slope = static_cast<float>(negative_slope);
  conv.x = static_cast<const uint16_t*>(x.const_data_ptr());
  conv.weight.assign(conv.side * conv.line() * conv.padded(), 0.0f);
  conv.bias.assign(conv.padded(), 0.0f);
  std::memcpy(conv.bias.data(), bias.const_data_ptr(), sizeof(float) * conv.filters);
  const auto* from = static_cast<const float*>(weight.const_data_ptr());
  for (int64_t k = 0; k < conv.filters; ++k)
    for (int64_t c = 0; c < conv.channels; ++c)
      for (int64_t r = 0; r < conv.side; ++r)
        for (int64_t s = 0; s < conv.side; ++s) {
          const float value = from[k * weight.stride(0) + c * weight.stride(1) +
                                   r * weight.stride(2) + s * weight.stride(3)];
          conv.weight[((r * conv.side + s) * conv.channels + c) * conv.padded() + k] =
              from_bfloat16(to_bfloat16(value));
        }
  return conv;
}

// The float32 copy of an image; its zeros are there already.
void copy_image(const FrozenConv& conv, int64_t image, float* to) {
  const int64_t line = conv.width * conv.channels, rows = conv.rows + conv.side - 1;
  const int64_t fitting = std::min(conv.width, conv.copy_columns() - conv.before);
  for (int64_t row = 0; row < std::min(conv.height, rows - conv.before); ++row) {
    const uint16_t* from = conv.x + (image * conv.height + row) * line;
    float* out = to + ((row + conv.before) * conv.copy_columns() + conv.before) * conv.channels;
    for (int64_t i = 0; i < fitting * conv.channels; ++i) out[i] = from_bfloat16(from[i]);
  }
}

// The results before the activation of kPixels pixels, for 16 filters.
RESFAST_BF16_INLINE void convolve_pixels(
    const FrozenConv& conv, const float* from, int64_t filter, __m512 (&sum)[kPixels]) {
  const __m512 bias = _mm512_loadu_ps(conv.bias.data() + filter);
#pragma GCC unroll 4
  for (int64_t pixel = 0; pixel < kPixels; ++pixel) sum[pixel] = bias;
  const float* weight = conv.weight.data() + filter;
  for (int64_t row = 0; row < conv.side; ++row) {
    const float* values = from + row * conv.copy_columns() * conv.channels;
    for (int64_t tap = 0; tap < conv.line(); ++tap, weight += conv.padded()) {
      const __m512 filters = _mm512_loadu_ps(weight);
#pragma GCC unroll 4
      for (int64_t pixel = 0; pixel < kPixels; ++pixel)
        sum[pixel] = _mm512_fmadd_ps(
            _mm512_set1_ps(values[pixel * conv.channels + tap]), filters, sum[pixel]);
    }
  }
}

// Calls `part(image, pixel, count, filter, mask, sums)` for the pixels of [first, last) images, of
// which `count` exist, and 16 filters.
template <class Part>
RESFAST_BF16 void for_pixels(const FrozenConv& conv, int64_t first, int64_t last, Part part) {
  std::vector<float> copy(conv.copy_size(), 0.0f);
  for (int64_t image = first; image < last; ++image) {
    copy_image(conv, image, copy.data());
    for (int64_t row = 0; row < conv.rows; ++row)
      for (int64_t column = 0; column < conv.columns; column += kPixels) {
        const float* from =
            copy.data() + (row * conv.copy_columns() + column) * conv.channels;
        const int64_t pixel = (image * conv.rows + row) * conv.columns + column;
        const int64_t count = std::min(kPixels, conv.columns - column);
        for (int64_t filter = 0; filter < conv.filters; filter += kLanes) {
          __m512 sum[kPixels];
          convolve_pixels(conv, from, filter, sum);
          part(image, pixel, count, filter, lane_mask(conv.filters - filter), sum);
        }
      }
  }
}

template <int64_t kActivation>
RESFAST_BF16 void write_images(
    const FrozenConv& conv, int64_t first, int64_t last, uint16_t* out) {
  for_pixels(
      conv, first, last,
      [&](int64_t, int64_t pixel, int64_t count, int64_t filter, __mmask16 mask,
          const __m512 (&sum)[kPixels]) RESFAST_BF16 {
        uint16_t* to = out + pixel * conv.filters + filter;
#pragma GCC unroll 4
        for (int64_t i = 0; i < kPixels; ++i)
          if (i < count)
            store_bf16(
                mask, to + i * conv.filters, activated(sum[i], kActivation, conv.negative_slope));
      });
}

// Adds the gradients before the activation to the sums of each image, [N][padded].
template <int64_t kActivation>
RESFAST_BF16 void add_images(
    const FrozenConv& conv, int64_t first, int64_t last, const uint16_t* grad, float* sums) {
  for_pixels(
      conv, first, last,
      [&](int64_t image, int64_t pixel, int64_t count, int64_t filter, __mmask16 mask,
          const __m512 (&sum)[kPixels]) RESFAST_BF16 {
        float* to = sums + image * conv.padded() + filter;
        __m512 total = _mm512_loadu_ps(to);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kPixels; ++i) {
          if (i >= count) continue;
          __m512 z = sum[i];
          if constexpr (kActivation == kLeakyRelu || kActivation == kRelu)
            z = activated(z, kActivation, conv.negative_slope);
          total = _mm512_add_ps(
              total, act_gradient<kActivation>(
                         load_bf16(mask, grad + (pixel + i) * conv.filters + filter), z,
                         conv.negative_slope));
        }
        _mm512_storeu_ps(to, total);
      });
}

Tensor frozen_conv_forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t before, int64_t behind,
    int64_t activation, double negative_slope) {
  const FrozenConv conv = checked(x, weight, bias, before, behind, activation, negative_slope);
  Tensor out = torch::stable::empty(
      {conv.batch, conv.filters, conv.rows, conv.columns}, ScalarType::BFloat16, std::nullopt,
      std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  with_activation(activation, [&](auto which) {
    share_all(conv.batch, [&](int64_t first, int64_t last) {
      write_images<decltype(which)::value>(conv, first, last, to);
    });
  });
  return out;
}

// The gradient of the bias, float32 [K].
Tensor frozen_conv_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t before,
    int64_t behind, int64_t activation, double negative_slope) {
  const FrozenConv conv = checked(x, weight, bias, before, behind, activation, negative_slope);
  check_map("grad", grad, {conv.batch, conv.filters, conv.rows, conv.columns});
  const auto* from = static_cast<const uint16_t*>(grad.const_data_ptr());
  std::vector<float> sums(conv.batch * conv.padded(), 0.0f);
  with_activation(activation, [&](auto which) {
    share_all(conv.batch, [&](int64_t first, int64_t last) {
      add_images<decltype(which)::value>(conv, first, last, from, sums.data());
    });
  });
  Tensor out = torch::stable::empty({conv.filters}, ScalarType::Float);
  for (int64_t filter = 0; filter < conv.filters; ++filter) {
    double total = 0;
    for (int64_t image = 0; image < conv.batch; ++image)
      total += sums[image * conv.padded() + filter];
    static_cast<float*>(out.mutable_data_ptr())[filter] = static_cast<float>(total);
  }
  return out;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def(
      "frozen_conv_forward(Tensor x, Tensor weight, Tensor bias, int before, int behind, "
      "int activation, float negative_slope) -> Tensor");
  m.def(
      "frozen_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, int before, "
      "int behind, int activation, float negative_slope) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("frozen_conv_forward", TORCH_BOX(&resfast::frozen_conv_forward));
  m.impl("frozen_conv_backward", TORCH_BOX(&resfast::frozen_conv_backward));
}

#endif
