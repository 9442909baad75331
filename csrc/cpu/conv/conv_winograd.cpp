// 3x3 convolution in bfloat16 by Winograd's minimal filtering: tiles of 2x2 to 4x4 results,
// computed from one matrix product of transformed inputs and weights per point.
//
// - Stride 1: F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308), 16 points, 2.25 times fewer
//   multiplications than the 36 of a plain tile.
// - Stride 1: F(4x4, 3x3), 36 points instead of 144, 4 times fewer, with 3 times the rounding
//   error. F(3x3, 3x3), 25 points instead of 81, for images that 4x4 tiles do not divide.
// - Stride 2: in each direction the middle tap reads every other input, and the outer two read the
//   rest as a convolution of stride 1 with two taps, for which F(2, 2) needs 3 multiplications per
//   2 results. With the 2 of the middle tap: 25 points, 1.44 times fewer multiplications.
//
// A thread transforms the inputs of a block of tiles (in float32, rounded to bfloat16 once),
// multiplies them with one panel of weights after the other, transforms back in float32 and applies
// the epilogue: only the input and the result leave its cache.

#if defined(__x86_64__)

#include "winograd.h"

namespace resfast {
namespace {

// Minimum per block, to amortize reading the weights.
inline int64_t least_tiles() { return amx::supported() ? 64 : 24; }

// inputs[point][tile][i] = (B^T d B)[point] of the inputs d of a tile, for 16 channels of each
// tile, starting (themselves or their group) at `channel`.
template <class Form, Channels kWhich>
RESFAST_BF16 void transform_channels(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t count, int64_t channel,
    uint16_t* inputs, int64_t point_stride, int64_t tile_stride) {
  transform_tiles<Form, kWhich>(
      shape, tiles, first, count, channel,
      [&](int64_t tile, int row, const __m512* values) RESFAST_BF16 {
        uint16_t* to = inputs + Form::kSide * row * point_stride + tile * tile_stride;
#pragma GCC unroll 6
        for (int i = 0; i < Form::kSide; ++i)
          _mm256_store_si256(
              reinterpret_cast<__m256i*>(to + i * point_stride),
              (__m256i)_mm512_cvtneps_pbh(values[i]));
      });
}

template <class Form>
void transform_inputs(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t count, uint16_t* inputs,
    int64_t point_stride, int64_t tile_stride) {
  auto transform = [&](auto which, int64_t channel, int64_t at) {
    transform_channels<Form, decltype(which)::value>(
        shape, tiles, first, count, channel, inputs + at, point_stride, tile_stride);
  };
  int64_t channel = 0;
  for (; channel + 32 <= shape.channels; channel += 32) {
    transform(std::integral_constant<Channels, Channels::kEven>{}, channel, channel);
    transform(std::integral_constant<Channels, Channels::kOdd>{}, channel, channel + kLanes);
  }
  for (; channel < shape.channels; channel += kLanes)
    transform(std::integral_constant<Channels, Channels::kRest>{}, channel, channel);
}

// A^T m A for each tile and 16 outputs at a time, then the epilogue.
template <class Form>
RESFAST_BF16 void transform_outputs(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t count, int64_t panel,
    const float* sums, int64_t point_stride) {
  constexpr int kSide = Form::kSide, kResults = Form::kResults;
  const int64_t blocks = panel_blocks(shape.outputs, panel);
  TileAt at(tiles, first);
  for (int64_t tile = 0; tile < count; ++tile, at.next()) {
    const int64_t pixel = (at.image * shape.rows + at.row) * shape.columns + at.column;
    const int64_t rows = shape.rows - at.row, columns = shape.columns - at.column;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = sums + (tile * blocks + block) * kLanes;
      __m512 half[kResults][kSide];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) {
        __m512 m[kSide], y[kResults];
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) m[i] = _mm512_load_ps(from + (kSide * i + j) * point_stride);
        Form::results(m, y);
#pragma GCC unroll 4
        for (int i = 0; i < kResults; ++i) half[i][j] = y[i];
      }
      const int64_t output = panel * kPanel + block * kLanes;
      const __mmask16 mask = lane_mask(shape.outputs - output);
#pragma GCC unroll 4
      for (int i = 0; i < kResults; ++i) {
        if (i >= rows) break;
        __m512 y[kResults];
        Form::results(half[i], y);
#pragma GCC unroll 4
        for (int j = 0; j < kResults; ++j)
          if (j < columns) finish(shape, pixel + i * shape.columns + j, output, mask, y[j]);
      }
    }
  }
}

// Number of tiles multiplied at once.
template <class Form>
int64_t block_tiles(const ConvShape& shape) {
  const int64_t tile_stride = round_up(shape.channels, kLanes), multiple = row_multiple();
  const int64_t per_tile = kPoints<Form> * (2 * tile_stride + 4 * kPanel); // bytes
  return std::max(least_tiles(), block_bytes() / per_tile / multiple * multiple);
}

template <class Form>
void winograd_part(
    const ConvShape& shape, const Tiles& tiles, const uint16_t* packed, int64_t begin, int64_t end,
    int64_t panel_begin, int64_t panel_end) {
  const int64_t pairs = ceil_div(shape.channels, 2);
  const int64_t tile_stride = round_up(shape.channels, kLanes);
  const int64_t multiple = row_multiple();
  int64_t most = block_tiles<Form>(shape);
  const int64_t parts = ceil_div(end - begin, most); // of equal size
  most = round_up(ceil_div(end - begin, parts), multiple);
  const amx::Tiles amx_tiles(amx::supported());
  thread_local Workspace<uint16_t> inputs_memory;
  thread_local Workspace<float> sums_memory;
  // Not a multiple of 4096 bytes apart, which would map to the same cache sets.
  const int64_t input_stride = most * tile_stride + 2 * kLanes;
  uint16_t* inputs = inputs_memory.get(kPoints<Form> * input_stride);
  float* sums = sums_memory.get(kPoints<Form> * (most * kPanel + kLanes));
  for (int64_t first = begin; first < end; first += most) {
    const int64_t count = std::min(most, end - first);
    transform_inputs<Form>(shape, tiles, first, count, inputs, input_stride, tile_stride);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t blocks = panel_blocks(shape.outputs, panel), width = blocks * kLanes;
      const uint16_t* weights = packed + panel_start<Form>(panel, pairs);
      const int64_t sums_stride = most * width + kLanes;
      const int64_t output = panel * kPanel, last = std::min(output + kPanel, shape.outputs);
      auto of_panel = [&](const uint16_t* pixels) {
        return Squares{
            pixels, shape.rows, shape.columns, shape.outputs, output, last, Form::kResults};
      };
      Prefetch<true> results(of_panel(shape.out), tiles, first, count);
      Prefetch<false> residual(of_panel(shape.residual), tiles, first, count);
      // Prefetches the next block's inputs during the last panel.
      const int64_t next = panel + 1 == panel_end ? std::min(most, end - first - count) : 0;
      Prefetch<false> following(input_squares<Form>(shape), tiles, first + count, next);
      const int64_t lines = ceil_div(results.lines(), kPoints<Form>);
      const int64_t input_lines = ceil_div(following.lines(), kPoints<Form>);
      for (int64_t point = 0; point < kPoints<Form>; ++point) {
        results.bring(lines), residual.bring(lines), following.bring(input_lines);
        product(inputs + point * input_stride, tile_stride, round_up(count, tile_rows(blocks)),
                weights + point * point_size(width, pairs), pairs, blocks,
                sums + point * sums_stride);
      }
      transform_outputs<Form>(shape, tiles, first, count, panel, sums, sums_stride);
    }
  }
}

template <class Form>
void multiply_tiles(const ConvShape& shape, const uint16_t* packed) {
  const Tiles tiles(shape, Form::kResults);
  share_out(
      tiles.count, block_tiles<Form>(shape), shape,
      [&](int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) {
        winograd_part<Form>(shape, tiles, packed, begin, end, panel_begin, panel_end);
      });
}

// G g G^T of one 3x3 kernel.
template <class Form>
RESFAST_BF16 void transform_kernel(const uint16_t* kernel, uint16_t* points, int64_t point_stride) {
  constexpr int kSide = Form::kSide;
  float columns[kSide][3];
  for (int j = 0; j < 3; ++j) {
    float g[3], u[kSide];
    for (int i = 0; i < 3; ++i) g[i] = from_bfloat16(kernel[3 * i + j]);
    Form::kernel(g, u);
    for (int i = 0; i < kSide; ++i) columns[i][j] = u[i];
  }
  for (int i = 0; i < kSide; ++i) {
    float u[kSide];
    Form::kernel(columns[i], u);
    for (int j = 0; j < kSide; ++j)
      points[(kSide * i + j) * point_stride] = to_bfloat16(u[j]);
  }
}

template <class Form>
Tensor pack(const Tensor& weight) {
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  const int64_t pairs = ceil_div(channels, 2);
  Tensor packed =
      torch::stable::empty({winograd_size<Form>(outputs, channels)}, ScalarType::BFloat16);
  const auto* from = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  std::fill(to, to + packed.numel(), uint16_t{0});
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t panel = output / kPanel, lane = output % kPanel;
    const int64_t width = panel_blocks(outputs, panel) * kLanes;
    uint16_t* base = to + panel_start<Form>(panel, pairs);
    for (int64_t i = 0; i < channels; ++i)
      transform_kernel<Form>(
          from + (output * channels + channel_of(i, channels)) * 9,
          base + (i / 2 * width + lane) * 2 + i % 2, point_size(width, pairs));
  }
  return packed;
}

Tensor conv_winograd_pack(const Tensor& weight, int64_t stride, int64_t tile) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  check_weight(weight);
  if (weight.size(2) != 3 || weight.size(3) != 3)
    fail("weight is ", shape_name(weight.sizes()), "; expected [K, C, 3, 3]");
  check_tile(tile, stride);
  return with_form(tile, stride, [&](auto form) { return pack<decltype(form)>(weight); });
}

template <class Form>
Tensor convolve_by(
    const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
    int64_t activation, double negative_slope) {
  return convolve(
      x, packed, bias, residual, geometry, activation, negative_slope,
      winograd_size<Form>(geometry[0], geometry[1]),
      multiply_tiles<Form>);
}

Tensor conv_winograd(
    const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
    int64_t activation, double negative_slope, int64_t tile) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  check_geometry(geometry);
  check_tile(tile, geometry[4]);
  return with_form(tile, geometry[4], [&](auto form) {
    return convolve_by<decltype(form)>(
        x, packed, bias, residual, geometry, activation, negative_slope);
  });
}

// The input gradient of a convolution of stride 2 and padding 1, from the result's gradient x and
// the weight packed by conv_train_pack; geometry: channels, rows and columns of the input, channels
// of x.
Tensor conv_winograd_transposed(
    const Tensor& x, const Tensor& packed, const std::vector<int64_t>& geometry) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  if (geometry.size() != 4 || *std::min_element(geometry.begin(), geometry.end()) < 1)
    fail("geometry is ", shape_name(geometry), "; expected four numbers of at least 1");
  ConvShape shape{};
  shape.outputs = geometry[0], shape.rows = geometry[1], shape.columns = geometry[2];
  shape.channels = geometry[3];
  shape.height = ceil_div(shape.rows, 2), shape.width = ceil_div(shape.columns, 2);
  check_map("x", x, {-1, shape.channels, shape.height, shape.width});
  shape.batch = x.size(0);
  check_packed(packed, winograd_size<Form2Stride2>(shape.outputs, shape.channels));
  Tensor out = new_result(shape);
  shape.plain = true;
  shape.x = static_cast<const uint16_t*>(x.const_data_ptr());
  shape.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  multiply_tiles<Form2Transposed>(shape, static_cast<const uint16_t*>(packed.const_data_ptr()));
  return out;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("conv_winograd_pack(Tensor weight, int stride, int tile=2) -> Tensor");
  m.def(
      "conv_winograd(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[] geometry, "
      "int activation, float negative_slope, int tile=2) -> Tensor");
  m.def("conv_winograd_transposed(Tensor x, Tensor packed, int[] geometry) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("conv_winograd_transposed", TORCH_BOX(&resfast::conv_winograd_transposed));
  m.impl("conv_winograd_pack", TORCH_BOX(&resfast::conv_winograd_pack));
  m.impl("conv_winograd", TORCH_BOX(&resfast::conv_winograd));
}

#endif
