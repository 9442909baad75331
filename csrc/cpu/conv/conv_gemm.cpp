// Convolution in bfloat16 as a matrix product of input patches with packed weights.
//
// A thread copies the patches of a block of rows (pixels of the result) into a matrix [rows, R * S
// * C] and multiplies it with one panel of weights after the other.

#if defined(__x86_64__)

#include "conv_bf16.h"

namespace resfast {
namespace {

RESFAST_BF16_INLINE void copy(const uint16_t* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  const __mmask32 rest = (uint32_t{1} << (count - i)) - 1;
  _mm512_mask_storeu_epi16(to + i, rest, _mm512_maskz_loadu_epi16(rest, from + i));
}

// Copies the patches of some pixels of the result; a patch has `size` values, of which those after
// R S C are 0.
RESFAST_BF16 void copy_patches(
    const ConvShape& shape, int64_t first, int64_t count, uint16_t* to, int64_t size) {
  const int64_t channels = shape.channels, used = shape.kernel_h * shape.kernel_w * channels;
  int64_t column = first % shape.columns, row = first / shape.columns % shape.rows;
  int64_t image = first / shape.columns / shape.rows;
  for (int64_t pixel = 0; pixel < count; ++pixel, to += size) {
    const int64_t top = row * shape.stride_h - shape.padding_h;
    const int64_t left = column * shape.stride_w - shape.padding_w;
    const int64_t begin = std::clamp<int64_t>(-left, 0, shape.kernel_w);
    const int64_t end = std::clamp<int64_t>(shape.width - left, begin, shape.kernel_w);
    if (top < 0 || top + shape.kernel_h > shape.height || end - begin < shape.kernel_w)
      std::fill(to, to + used, uint16_t{0});
    std::fill(to + used, to + size, uint16_t{0});
    const int64_t last = std::min(shape.kernel_h, shape.height - top);
    for (int64_t r = std::max<int64_t>(0, -top); r < last; ++r) {
      const int64_t at = (image * shape.height + top + r) * shape.width + left + begin;
      copy(shape.x + at * channels, (end - begin) * channels,
           to + (r * shape.kernel_w + begin) * channels);
    }
    if (++column < shape.columns) continue;
    column = 0;
    if (++row < shape.rows) continue;
    row = 0, ++image;
  }
}

RESFAST_BF16 void finish_rows(
    const ConvShape& shape, int64_t pixel, int64_t rows, int64_t panel, const float* sums) {
  const int64_t blocks = panel_blocks(shape.outputs, panel);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t output = panel * kPanel + block * kLanes;
      finish(shape, pixel + row, output, lane_mask(shape.outputs - output),
             _mm512_load_ps(sums + (row * blocks + block) * kLanes));
    }
}

int64_t patch_pairs(const ConvShape& shape) {
  return ceil_div(shape.kernel_h * shape.kernel_w * shape.channels, 2);
}

// Number of patches multiplied at once.
int64_t block_rows(const ConvShape& shape) {
  const int64_t multiple = row_multiple();
  const int64_t most = block_bytes() / (4 * patch_pairs(shape)) / multiple * multiple;
  return std::clamp(most, multiple, 8 * multiple);
}

void gemm_part(
    const ConvShape& shape, const uint16_t* packed, int64_t begin, int64_t end, int64_t panel_begin,
    int64_t panel_end) {
  const int64_t pairs = patch_pairs(shape), most = block_rows(shape);
  const amx::Tiles tiles(amx::supported());
  thread_local Workspace<uint16_t> patches_memory;
  thread_local Workspace<float> sums_memory;
  uint16_t* patches = patches_memory.get(most * 2 * pairs);
  float* sums = sums_memory.get(most * kPanel);
  for (int64_t first = begin; first < end; first += most) {
    const int64_t rows = std::min(most, end - first);
    copy_patches(shape, first, rows, patches, 2 * pairs);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t blocks = panel_blocks(shape.outputs, panel);
      product(patches, 2 * pairs, round_up(rows, tile_rows(blocks)),
              packed + panel * kPanel * 2 * pairs, pairs, blocks, sums);
      finish_rows(shape, first, rows, panel, sums);
    }
  }
}

int64_t gemm_size(int64_t outputs, int64_t channels, int64_t kernel_h, int64_t kernel_w) {
  return round_up(outputs, kLanes) * round_up(channels * kernel_h * kernel_w, 2);
}

Tensor conv_gemm_pack(const Tensor& weight) {
  check_weight(weight);
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  const int64_t kernel_h = weight.size(2), kernel_w = weight.size(3);
  const int64_t taps = kernel_h * kernel_w, pairs = ceil_div(taps * channels, 2);
  Tensor packed = torch::stable::empty(
      {gemm_size(outputs, channels, kernel_h, kernel_w)}, ScalarType::BFloat16);
  const auto* from = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  std::fill(to, to + packed.numel(), uint16_t{0});
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t panel = output / kPanel, lane = output % kPanel;
    const int64_t width = panel_blocks(outputs, panel) * kLanes;
    uint16_t* base = to + panel * kPanel * 2 * pairs;
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t i = tap * channels + channel; // as in a patch
        base[(i / 2 * width + lane) * 2 + i % 2] = from[(output * channels + channel) * taps + tap];
      }
  }
  return packed;
}

Tensor conv_gemm(
    const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
    int64_t activation, double negative_slope) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  if (geometry.size() != 8 || *std::min_element(geometry.begin(), geometry.begin() + 4) < 1)
    fail("geometry is ", shape_name(geometry), "; expected K, C, R, S, two strides, two paddings");
  const int64_t size = gemm_size(geometry[0], geometry[1], geometry[2], geometry[3]);
  return convolve(
      x, packed, bias, residual, geometry, activation, negative_slope, size,
      [](const ConvShape& shape, const uint16_t* weights) {
        share_out(
            shape.batch * shape.rows * shape.columns, block_rows(shape), shape,
            [&](int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) {
              gemm_part(shape, weights, begin, end, panel_begin, panel_end);
            });
      });
}

bool conv_bf16_supported() { return bf16_supported(); }
bool conv_bf16_amx() { return bf16_supported() && amx::supported(); }

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("conv_bf16_supported() -> bool");
  m.def("conv_bf16_amx() -> bool");
  m.def("conv_gemm_pack(Tensor weight) -> Tensor");
  m.def(
      "conv_gemm(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[] geometry, "
      "int activation, float negative_slope) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("conv_bf16_supported", TORCH_BOX(&resfast::conv_bf16_supported));
  m.impl("conv_bf16_amx", TORCH_BOX(&resfast::conv_bf16_amx));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("conv_gemm_pack", TORCH_BOX(&resfast::conv_gemm_pack));
  m.impl("conv_gemm", TORCH_BOX(&resfast::conv_gemm));
}

#endif
