// 3x3 convolution of stride 1 in bfloat16 by Winograd's F(2x2, 3x3) (Lavin and Gray,
// arXiv:1509.09308): 16 matrix products for tiles of 2x2 results, 2.25 times fewer multiplications.
//
// A thread takes a block of tiles, transforms their 4x4 inputs (float32, rounded to bfloat16 once),
// multiplies them with one panel of weights after the other, transforms back in float32 and ends
// with the epilogue: nothing but the input and the result leaves its cache.

#if defined(__x86_64__)

#include "conv_bf16.h"

namespace resfast {
namespace {

constexpr int64_t kPoints = 16; // of a transformed tile
constexpr int64_t kBlockBytes = 256 * 1024; // of a block's inputs and sums: a part of L2
constexpr int64_t kLeastTiles = 24; // per block, so that reading the weights is worth it

struct Tiles {
  int64_t rows, columns, count; // per image, per image, of the batch
  explicit Tiles(const ConvShape& shape)
      : rows(ceil_div(shape.rows, 2)), columns(ceil_div(shape.columns, 2)),
        count(shape.batch * rows * columns) {}
};

struct TileAt {
  int64_t image, row, column; // of the tile's first result
  TileAt(const Tiles& tiles, int64_t tile)
      : image(tile / tiles.columns / tiles.rows), row(tile / tiles.columns % tiles.rows * 2),
        column(tile % tiles.columns * 2) {}
};

// inputs[point][tile][channel] = (B^T d B)[point] of the tile's 4x4 values d.
RESFAST_BF16 void transform_inputs(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t count, uint16_t* inputs,
    int64_t point_stride, int64_t tile_stride) {
  for (int64_t tile = 0; tile < count; ++tile) {
    const TileAt at(tiles, first + tile);
    const int64_t top = at.row - shape.padding_h, left = at.column - shape.padding_w;
    const uint16_t* source =
        shape.x + ((at.image * shape.height + top) * shape.width + left) * shape.channels;
    bool inside[4][4];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j)
        inside[i][j] = top + i >= 0 && top + i < shape.height && left + j >= 0 &&
            left + j < shape.width;
    for (int64_t channel = 0; channel < shape.channels; channel += kLanes) {
      const __mmask16 mask = lane_mask(shape.channels - channel);
      __m512 d[4][4], t[4][4];
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j)
          d[i][j] = load_bf16(
              inside[i][j] ? mask : __mmask16{0},
              source + (i * shape.width + j) * shape.channels + channel);
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        t[0][j] = _mm512_sub_ps(d[0][j], d[2][j]);
        t[1][j] = _mm512_add_ps(d[1][j], d[2][j]);
        t[2][j] = _mm512_sub_ps(d[2][j], d[1][j]);
        t[3][j] = _mm512_sub_ps(d[1][j], d[3][j]);
      }
      uint16_t* to = inputs + tile * tile_stride + channel;
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const __m512 row[4] = {
            _mm512_sub_ps(t[i][0], t[i][2]), _mm512_add_ps(t[i][1], t[i][2]),
            _mm512_sub_ps(t[i][2], t[i][1]), _mm512_sub_ps(t[i][1], t[i][3])};
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j)
          _mm256_store_si256(
              reinterpret_cast<__m256i*>(to + (4 * i + j) * point_stride),
              (__m256i)_mm512_cvtneps_pbh(row[j]));
      }
    }
  }
}

// A^T m A for each tile and 16 outputs at a time, then the epilogue.
RESFAST_BF16 void transform_outputs(
    const ConvShape& shape, const Tiles& tiles, int64_t first, int64_t count, int64_t panel,
    const float* sums, int64_t point_stride) {
  const int64_t blocks = panel_blocks(shape.outputs, panel);
  for (int64_t tile = 0; tile < count; ++tile) {
    const TileAt at(tiles, first + tile);
    const int64_t pixel = (at.image * shape.rows + at.row) * shape.columns + at.column;
    const bool right = at.column + 1 < shape.columns, below = at.row + 1 < shape.rows;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = sums + (tile * blocks + block) * kLanes;
      __m512 upper[4], lower[4];
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) {
        const __m512 m0 = _mm512_load_ps(from + j * point_stride);
        const __m512 m1 = _mm512_load_ps(from + (4 + j) * point_stride);
        const __m512 m2 = _mm512_load_ps(from + (8 + j) * point_stride);
        const __m512 m3 = _mm512_load_ps(from + (12 + j) * point_stride);
        upper[j] = _mm512_add_ps(_mm512_add_ps(m0, m1), m2);
        lower[j] = _mm512_sub_ps(_mm512_sub_ps(m1, m2), m3);
      }
      const int64_t output = panel * kPanel + block * kLanes;
      const __mmask16 mask = lane_mask(shape.outputs - output);
      finish(shape, pixel, output, mask,
             _mm512_add_ps(_mm512_add_ps(upper[0], upper[1]), upper[2]));
      if (right)
        finish(shape, pixel + 1, output, mask,
               _mm512_sub_ps(_mm512_sub_ps(upper[1], upper[2]), upper[3]));
      if (!below) continue;
      finish(shape, pixel + shape.columns, output, mask,
             _mm512_add_ps(_mm512_add_ps(lower[0], lower[1]), lower[2]));
      if (right)
        finish(shape, pixel + shape.columns + 1, output, mask,
               _mm512_sub_ps(_mm512_sub_ps(lower[1], lower[2]), lower[3]));
    }
  }
}

void winograd_part(
    const ConvShape& shape, const Tiles& tiles, const uint16_t* packed, int64_t begin, int64_t end,
    int64_t panel_begin, int64_t panel_end) {
  const int64_t pairs = ceil_div(shape.channels, 2);
  const int64_t tile_stride = round_up(shape.channels, kLanes);
  const int64_t per_tile = kPoints * (2 * tile_stride + 4 * kPanel); // bytes
  int64_t most = std::max(kLeastTiles, kBlockBytes / per_tile / kRowMultiple * kRowMultiple);
  const int64_t parts = ceil_div(end - begin, most); // of equal size
  most = round_up(ceil_div(end - begin, parts), kRowMultiple);
  thread_local Workspace<uint16_t> inputs_memory;
  thread_local Workspace<float> sums_memory;
  // Not a multiple of 4096 bytes apart, which would fall into the same sets of the cache.
  const int64_t input_stride = most * tile_stride + 2 * kLanes;
  uint16_t* inputs = inputs_memory.get(kPoints * input_stride);
  float* sums = sums_memory.get(kPoints * (most * kPanel + kLanes));
  for (int64_t first = begin; first < end; first += most) {
    const int64_t count = std::min(most, end - first);
    transform_inputs(shape, tiles, first, count, inputs, input_stride, tile_stride);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t blocks = panel_blocks(shape.outputs, panel), width = blocks * kLanes;
      const uint16_t* weights = packed + panel * kPanel * kPoints * 2 * pairs;
      const int64_t sums_stride = most * width + kLanes;
      for (int64_t point = 0; point < kPoints; ++point)
        product(inputs + point * input_stride, tile_stride, round_up(count, tile_rows(blocks)),
                weights + point * width * 2 * pairs, pairs, blocks, sums + point * sums_stride);
      transform_outputs(shape, tiles, first, count, panel, sums, sums_stride);
    }
  }
}

int64_t winograd_size(int64_t outputs, int64_t channels) {
  return kPoints * round_up(outputs, kLanes) * round_up(channels, 2);
}

// G g G^T of one 3x3 kernel.
void transform_kernel(const uint16_t* kernel, uint16_t* points, int64_t stride) {
  float half[4][3];
  for (int j = 0; j < 3; ++j) {
    const float a = from_bfloat16(kernel[j]), b = from_bfloat16(kernel[3 + j]);
    const float c = from_bfloat16(kernel[6 + j]);
    half[0][j] = a, half[1][j] = 0.5f * (a + b + c), half[2][j] = 0.5f * (a - b + c);
    half[3][j] = c;
  }
  for (int i = 0; i < 4; ++i) {
    const float a = half[i][0], b = half[i][1], c = half[i][2];
    const float row[4] = {a, 0.5f * (a + b + c), 0.5f * (a - b + c), c};
    for (int j = 0; j < 4; ++j) points[(4 * i + j) * stride] = to_bfloat16(row[j]);
  }
}

Tensor conv_winograd_pack(const Tensor& weight) {
  check_weight(weight);
  if (weight.size(2) != 3 || weight.size(3) != 3)
    fail("weight is ", shape_name(weight.sizes()), "; expected [K, C, 3, 3]");
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  const int64_t pairs = ceil_div(channels, 2);
  Tensor packed = torch::stable::empty({winograd_size(outputs, channels)}, ScalarType::BFloat16);
  const auto* from = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* to = static_cast<uint16_t*>(packed.mutable_data_ptr());
  std::fill(to, to + packed.numel(), uint16_t{0});
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t panel = output / kPanel, lane = output % kPanel;
    const int64_t width = panel_blocks(outputs, panel) * kLanes;
    uint16_t* base = to + panel * kPanel * kPoints * 2 * pairs;
    for (int64_t channel = 0; channel < channels; ++channel)
      transform_kernel(
          from + (output * channels + channel) * 9,
          base + (channel / 2 * width + lane) * 2 + channel % 2, width * 2 * pairs);
  }
  return packed;
}

Tensor conv_winograd(
    const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
    int64_t activation, double negative_slope) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  if (geometry.size() != 8 || *std::min_element(geometry.begin(), geometry.begin() + 6) < 1 ||
      geometry[2] != 3 || geometry[3] != 3 || geometry[4] != 1 || geometry[5] != 1)
    fail("geometry is ", shape_name(geometry), "; expected K, C, 3, 3, 1, 1 and two paddings");
  return convolve(
      x, packed, bias, residual, geometry, activation, negative_slope, winograd_size(geometry[0], geometry[1]),
      [](const ConvShape& shape, const uint16_t* weights) {
        const Tiles tiles(shape);
        share_out(
            tiles.count, shape,
            [&](int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) {
              winograd_part(shape, tiles, weights, begin, end, panel_begin, panel_end);
            });
      });
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("conv_winograd_pack(Tensor weight) -> Tensor");
  m.def(
      "conv_winograd(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int[] geometry, "
      "int activation, float negative_slope) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("conv_winograd_pack", TORCH_BOX(&resfast::conv_winograd_pack));
  m.impl("conv_winograd", TORCH_BOX(&resfast::conv_winograd));
}

#endif
