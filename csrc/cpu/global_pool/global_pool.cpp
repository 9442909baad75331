// Maximum and mean of each channel of bfloat16 maps, and their gradient, on AVX512-BF16.
// Documentation of the operator: resfast/ops/global_pool/op.py.

#if defined(__x86_64__)

#include <tuple>

#include "../conv/conv_bf16.h"

namespace resfast {
namespace {

struct Pool {
  int64_t batch, pixels, channels;
  bool largest, mean; // the results of an image: the maxima, then the means

  int64_t features() const { return channels * (largest + mean); }
};

Pool checked(const std::vector<int64_t>& size, bool largest, bool mean) {
  if (!bf16_supported()) fail("this processor has no AVX512-BF16");
  if (!largest && !mean) fail("neither the maximum nor the mean is asked for");
  const Pool pool{size[0], size[2] * size[3], size[1], largest, mean};
  if (pool.pixels < 1 || pool.pixels > INT32_MAX)
    fail("maps of ", shape_name(size), "; expected 1 to 2^31 - 1 pixels");
  return pool;
}

// 16 channels of an image; also the pixel (row-major) of each maximum.
RESFAST_BF16 void pool_channels(
    const Pool& pool, const uint16_t* x, __mmask16 mask, uint16_t* largest, uint16_t* mean,
    int32_t* positions) {
  __m512 best = load_bf16(mask, x), sum = best;
  __m512i position = _mm512_setzero_si512();
  for (int64_t pixel = 1; pixel < pool.pixels; ++pixel) {
    const __m512 value = load_bf16(mask, x + pixel * pool.channels);
    sum = _mm512_add_ps(sum, value);
    // Larger, or NaN, which is kept as in torch.nn.functional.max_pool2d.
    const __mmask16 taken = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ) |
        _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    best = _mm512_mask_mov_ps(best, taken, value);
    position = _mm512_mask_mov_epi32(
        position, taken, _mm512_set1_epi32(static_cast<int32_t>(pixel)));
  }
  if (pool.largest) {
    store_bf16(mask, largest, best);
    _mm512_mask_storeu_epi32(positions, mask, position);
  }
  if (pool.mean)
    store_bf16(mask, mean, _mm512_div_ps(sum, _mm512_set1_ps(static_cast<float>(pool.pixels))));
}

// The features [N, C] or [N, 2 C], and the positions of the maxima, int32 [N or 0, C].
std::tuple<Tensor, Tensor> pool_forward(const Tensor& x, bool largest, bool mean) {
  check_map("x", x, {-1, -1, -1, -1});
  const Pool pool = checked({x.size(0), x.size(1), x.size(2), x.size(3)}, largest, mean);
  Tensor out = torch::stable::empty({pool.batch, pool.features()}, ScalarType::BFloat16);
  Tensor positions = torch::stable::empty({largest ? pool.batch : 0, pool.channels}, ScalarType::Int);
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  auto* where = static_cast<int32_t*>(positions.mutable_data_ptr());
  share_all(pool.batch, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image)
      for (int64_t channel = 0; channel < pool.channels; channel += kLanes) {
        uint16_t* features = to + image * pool.features() + channel;
        pool_channels(
            pool, from + image * pool.pixels * pool.channels + channel,
            lane_mask(pool.channels - channel), features,
            features + (largest ? pool.channels : 0), where + image * pool.channels + channel);
      }
  });
  return {out, positions};
}

// The gradient of 16 channels of an image.
RESFAST_BF16 void spread_channels(
    const Pool& pool, const uint16_t* largest, const uint16_t* mean, const int32_t* positions,
    __mmask16 mask, uint16_t* to) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 peak = pool.largest ? load_bf16(mask, largest) : zero;
  const __m512i position =
      pool.largest ? _mm512_maskz_loadu_epi32(mask, positions) : _mm512_set1_epi32(-1);
  const __m512 level = pool.mean
      ? _mm512_div_ps(load_bf16(mask, mean), _mm512_set1_ps(static_cast<float>(pool.pixels)))
      : zero;
  const __m512 both = _mm512_add_ps(level, peak);
  for (int64_t pixel = 0; pixel < pool.pixels; ++pixel) {
    const __mmask16 here = _mm512_cmpeq_epi32_mask(
        position, _mm512_set1_epi32(static_cast<int32_t>(pixel)));
    store_bf16(mask, to + pixel * pool.channels, _mm512_mask_mov_ps(level, here, both));
  }
}

// The gradient of x [N, C, H, W], whose size is given.
Tensor pool_backward(
    const Tensor& grad, const Tensor& positions, const std::vector<int64_t>& size, bool largest,
    bool mean) {
  if (size.size() != 4) fail("size is ", shape_name(size), "; expected N, C, H, W");
  const Pool pool = checked(size, largest, mean);
  const auto check = [](const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows,
                        int64_t width) {
    if (tensor.scalar_type() != dtype || tensor.dim() != 2 || tensor.size(0) != rows ||
        tensor.size(1) != width || !tensor.is_contiguous() || !tensor.is_cpu())
      fail(name, " is ", dtype_name(tensor.scalar_type()), " ", shape_name(tensor.sizes()),
           "; expected ", dtype_name(dtype), " [", rows, ", ", width, "], contiguous, on the CPU");
  };
  check("grad", grad, ScalarType::BFloat16, pool.batch, pool.features());
  check("positions", positions, ScalarType::Int, largest ? pool.batch : 0, pool.channels);
  Tensor out = torch::stable::empty(
      size, ScalarType::BFloat16, std::nullopt, std::nullopt, std::nullopt,
      torch::headeronly::MemoryFormat::ChannelsLast);
  const auto* from = static_cast<const uint16_t*>(grad.const_data_ptr());
  const auto* where = static_cast<const int32_t*>(positions.const_data_ptr());
  auto* to = static_cast<uint16_t*>(out.mutable_data_ptr());
  share_all(pool.batch, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image)
      for (int64_t channel = 0; channel < pool.channels; channel += kLanes) {
        const uint16_t* features = from + image * pool.features() + channel;
        spread_channels(
            pool, features, features + (largest ? pool.channels : 0),
            where + image * pool.channels + channel, lane_mask(pool.channels - channel),
            to + image * pool.pixels * pool.channels + channel);
      }
  });
  return out;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("pool_forward(Tensor x, bool largest, bool mean) -> (Tensor, Tensor)");
  m.def(
      "pool_backward(Tensor grad, Tensor positions, int[] size, bool largest, bool mean) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("pool_forward", TORCH_BOX(&resfast::pool_forward));
  m.impl("pool_backward", TORCH_BOX(&resfast::pool_backward));
}

#endif
