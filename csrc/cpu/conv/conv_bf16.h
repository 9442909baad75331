// Shared by the bfloat16 convolutions: the matrix product on AVX512-BF16 or AMX, packed weights,
// the epilogue, arguments and their checks. Documentation of the operator: resfast/ops/conv/op.py.
//
// Weights are packed as panels of up to 64 outputs: [panel][pairs][outputs of the panel][2], where
// a pair is two consecutive terms of the sum, as _mm512_dpbf16_ps takes them, padded with zeros.
#pragma once

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // false positives in GCC's intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "amx.h"
#include "../../common/check.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/share.h"

#define RESFAST_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define RESFAST_BF16_INLINE inline RESFAST_BF16 __attribute__((always_inline))

namespace resfast {

constexpr int64_t kLanes = 16; // floats in a vector
constexpr int64_t kPanel = 4 * kLanes; // outputs that a tile of the product computes at once
constexpr int64_t kPairBlock = 128; // pairs per block of a panel (32 KiB), which stays in L1

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

inline bool bf16_supported() {
  return detect_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
}

// Number of blocks of 16 outputs in a panel.
inline int64_t panel_blocks(int64_t outputs, int64_t panel) {
  return std::min<int64_t>(4, ceil_div(outputs - panel * kPanel, kLanes));
}

// Rows computed at once; accumulators, a row's value and the weights fill the 32 registers.
inline int64_t tile_rows(int64_t blocks) {
  return amx::supported() ? amx::kRows : blocks > 2 ? 6 : 12;
}
inline int64_t row_multiple() { return amx::supported() ? amx::kRows : 12; } // divisible by tile_rows

// Bytes of a block's operands and sums: a part of L2. AMX computes faster than weights arrive from
// memory, so more rows must share them.
inline int64_t block_bytes() { return (amx::supported() ? 1024 : 256) * 1024; }

// Memory of one thread, kept between calls.
template <class Value>
class Workspace {
 public:
  Value* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(Value) + 64;
    if (memory_.size() < bytes) memory_.assign(bytes, 0);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<Value*>((begin + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<char> memory_;
};

// -- the matrix product --------------------------------------------------------------------------

// sums[row][output] (+)= sum over pairs of a[row][pair] * b[pair][output]. Strides are in values.
template <int Rows, int Blocks>
RESFAST_BF16 inline void product_tile(
    const uint16_t* a, int64_t row_stride, int64_t pair_stride, const uint16_t* b,
    int64_t b_stride, int64_t pairs, float* sums, int64_t sums_stride, bool add) {
  __m512 sum[Rows][Blocks];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Blocks; ++j)
      sum[i][j] = add ? _mm512_load_ps(sums + i * sums_stride + j * kLanes) : _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh weights[Blocks];
#pragma GCC unroll 4
    for (int j = 0; j < Blocks; ++j)
      weights[j] = (__m512bh)_mm512_loadu_si512(b + pair * b_stride + j * 2 * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      int32_t both;
      std::memcpy(&both, a + i * row_stride + pair * pair_stride, sizeof(both));
      const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int j = 0; j < Blocks; ++j)
        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], value, weights[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Blocks; ++j)
      _mm512_store_ps(sums + i * sums_stride + j * kLanes, sum[i][j]);
}

template <int Rows, int Blocks>
RESFAST_BF16 inline void product_panel(
    const uint16_t* a, int64_t row_stride, int64_t rows, const uint16_t* b, int64_t pairs,
    float* sums) {
  for (int64_t first = 0; first < pairs; first += kPairBlock) {
    const int64_t block = std::min(kPairBlock, pairs - first);
    for (int64_t row = 0; row < rows; row += Rows)
      product_tile<Rows, Blocks>(
          a + row * row_stride + 2 * first, row_stride, 2, b + first * Blocks * 2 * kLanes,
          Blocks * 2 * kLanes, block, sums + row * Blocks * kLanes, Blocks * kLanes, first > 0);
  }
}

// sums [rows, blocks * 16] = a [rows, row_stride] times one panel; rows must be a multiple of
// tile_rows. An `amx::Tiles` must be alive.
RESFAST_BF16 inline void product(
    const uint16_t* a, int64_t row_stride, int64_t rows, const uint16_t* b, int64_t pairs,
    int64_t blocks, float* sums) {
  if (amx::supported())
    return amx::product(a, row_stride, rows, b, pairs, blocks, kPairBlock, sums);
  switch (blocks) {
    case 1: return product_panel<12, 1>(a, row_stride, rows, b, pairs, sums);
    case 2: return product_panel<12, 2>(a, row_stride, rows, b, pairs, sums);
    case 3: return product_panel<6, 3>(a, row_stride, rows, b, pairs, sums);
    default: return product_panel<6, 4>(a, row_stride, rows, b, pairs, sums);
  }
}

// -- the epilogue --------------------------------------------------------------------------------

enum Activation : int64_t { kNone, kRelu, kLeakyRelu, kSilu, kGelu };

RESFAST_BF16_INLINE __m512 load_bf16(__mmask16 mask, const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

RESFAST_BF16_INLINE void store_bf16(__mmask16 mask, uint16_t* to, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

// exp as 2^n times a polynomial, accurate to a few float32 ulps; infinity from about 88.7.
RESFAST_BF16_INLINE __m512 exp_ps(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(100.0f));
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 value = _mm512_set1_ps(1.0f / 720);
  for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    value = _mm512_fmadd_ps(value, r, _mm512_set1_ps(term));
  return _mm512_scalef_ps(value, n);
}

// z is clamped to the range of the polynomials; beyond it, gelu is z or 0 to within 1e-5.
constexpr float kGeluReach = 5.0f;

template <size_t kTerms>
RESFAST_BF16_INLINE __m512 odd_polynomial(__m512 z, const float (&terms)[kTerms]) {
  const __m512 square = _mm512_fmsub_ps(
      _mm512_mul_ps(z, z), _mm512_set1_ps(2 / (kGeluReach * kGeluReach)), _mm512_set1_ps(1.0f));
  __m512 value = _mm512_set1_ps(terms[0]);
#pragma GCC unroll 12
  for (size_t i = 1; i < kTerms; ++i)
    value = _mm512_fmadd_ps(value, square, _mm512_set1_ps(terms[i]));
  return _mm512_fmadd_ps(value, z, _mm512_set1_ps(0.5f));
}

// min and max return the second operand if z is NaN.
RESFAST_BF16_INLINE __m512 least(__m512 z) { return _mm512_max_ps(_mm512_set1_ps(-kGeluReach), z); }
RESFAST_BF16_INLINE __m512 most(__m512 z) { return _mm512_min_ps(_mm512_set1_ps(kGeluReach), z); }

// Minimax polynomial in z^2 on [-kGeluReach, kGeluReach]: the normal CDF to 7e-6 / z.
constexpr float kNormal[] = {
    2.277308533e-03f, -6.278014759e-03f, 7.021223576e-03f, -8.329826224e-03f, 1.554792399e-02f,
    -2.421516129e-02f, 3.174414686e-02f, -4.031916975e-02f, 5.148801112e-02f, -7.030051865e-02f,
    1.413643019e-01f};

RESFAST_BF16_INLINE __m512 activated(__m512 value, int64_t activation, float negative_slope) {
  const __m512 zero = _mm512_setzero_ps();
  switch (activation) {
    case kRelu: return _mm512_max_ps(zero, value); // the second operand if either is NaN
    case kLeakyRelu: {
      const __mmask16 negative = _mm512_cmp_ps_mask(value, zero, _CMP_LT_OQ);
      return _mm512_mask_mul_ps(value, negative, value, _mm512_set1_ps(negative_slope));
    }
    case kSilu: {
      const __m512 power = exp_ps(_mm512_sub_ps(zero, value));
      return _mm512_div_ps(value, _mm512_add_ps(_mm512_set1_ps(1.0f), power));
    }
    case kGelu: {
      const __m512 lower = least(value);
      const __m512 result = _mm512_mul_ps(lower, odd_polynomial(most(lower), kNormal));
      const __mmask16 lost = _mm512_cmp_ps_mask(value, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
      return _mm512_mask_mov_ps(result, lost, _mm512_set1_ps(NAN)); // minus infinity times 0
    }
    default: return value;
  }
}

// -- arguments -----------------------------------------------------------------------------------

struct ConvShape {
  int64_t batch, height, width, channels; // of x
  int64_t outputs, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  int64_t rows, columns; // of the result
  int64_t activation;
  float negative_slope;
  const uint16_t* x; // [N, H, W, C]
  const float* bias; // [panels * 64], zeros after the last
  const uint16_t* residual; // null if not given
  uint16_t* out; // [N, P, Q, K]
  bool plain; // no bias, no residual, no activation

  int64_t panels() const { return ceil_div(outputs, kPanel); }
};

// Not inlined: hoisting the constants of silu and gelu out of loops slows other activations by 4 %.
RESFAST_BF16 __attribute__((noinline)) inline void finish_slowly(
    uint16_t* out, __mmask16 mask, __m512 value, int64_t activation) {
  store_bf16(mask, out, activated(value, activation, 0.0f));
}

// The result of one pixel for 16 outputs starting at `output`; `mask` selects those that exist.
RESFAST_BF16_INLINE void finish(
    const ConvShape& shape, int64_t pixel, int64_t output, __mmask16 mask, __m512 value) {
  const int64_t at = pixel * shape.outputs + output;
  if (shape.plain) return store_bf16(mask, shape.out + at, value);
  value = _mm512_add_ps(value, _mm512_loadu_ps(shape.bias + output));
  if (shape.residual) value = _mm512_add_ps(value, load_bf16(mask, shape.residual + at));
  const int64_t activation = shape.activation;
  if (activation >= kSilu) return finish_slowly(shape.out + at, mask, value, activation);
  store_bf16(mask, shape.out + at, activated(value, activation, shape.negative_slope));
}

inline __mmask16 lane_mask(int64_t left) {
  return static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1 << left) - 1);
}

inline bool is_channels_last(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t axis : {1, 3, 2, 0}) {
    if (tensor.size(axis) > 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return true;
}

inline void check_map(
    const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  if (tensor.scalar_type() != ScalarType::BFloat16)
    fail(name, " is ", dtype_name(tensor.scalar_type()), "; expected torch.bfloat16");
  bool same = tensor.dim() == 4;
  for (int64_t axis = 0; same && axis < 4; ++axis)
    same = expected[axis] < 0 ? tensor.size(axis) > 0 : tensor.size(axis) == expected[axis];
  if (!same) fail(name, " is ", shape_name(tensor.sizes()), "; expected ", shape_name(expected));
  if (!tensor.is_cpu()) fail(name, " is not on the CPU");
  if (!is_channels_last(tensor)) fail(name, " is not in channels_last memory");
}

inline void check_activation(int64_t activation) {
  if (activation < kNone || activation > kGelu)
    fail("activation ", activation, " is unknown; expected 0 to ", int64_t{kGelu});
}

inline void check_weight(const Tensor& weight) {
  if (weight.scalar_type() != ScalarType::BFloat16)
    fail("weight is ", dtype_name(weight.scalar_type()), "; expected torch.bfloat16");
  if (weight.dim() != 4 || weight.numel() == 0)
    fail("weight is ", shape_name(weight.sizes()), "; expected [K, C, R, S], none of them 0");
  if (!weight.is_contiguous() || !weight.is_cpu())
    fail("weight is not contiguous memory of the CPU");
}

inline void check_packed(const Tensor& packed, int64_t size) {
  if (packed.scalar_type() != ScalarType::BFloat16 || packed.numel() != size ||
      !packed.is_contiguous() || !packed.is_cpu())
    fail("packed weights of ", packed.numel(), " values; expected ", size, " of bfloat16");
}

inline Tensor new_result(const ConvShape& shape) {
  return torch::stable::empty(
      {shape.batch, shape.outputs, shape.rows, shape.columns}, ScalarType::BFloat16, std::nullopt,
      std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Checks the arguments of a 3x3 weight gradient.
inline ConvShape weight_gradient_shape(
    const Tensor& x, const Tensor& grad, int64_t stride, int64_t padding) {
  if (stride != 1 && stride != 2) fail("stride is ", stride, "; expected 1 or 2");
  if (padding < 0) fail("padding is ", padding, "; expected at least 0");
  check_map("x", x, {-1, -1, -1, -1});
  ConvShape shape{};
  shape.batch = x.size(0), shape.channels = x.size(1);
  shape.height = x.size(2), shape.width = x.size(3);
  shape.kernel_h = shape.kernel_w = 3;
  shape.stride_h = shape.stride_w = stride;
  shape.padding_h = shape.padding_w = padding;
  shape.rows = (shape.height + 2 * padding - 3) / stride + 1;
  shape.columns = (shape.width + 2 * padding - 3) / stride + 1;
  if (shape.height + 2 * padding < 3 || shape.width + 2 * padding < 3)
    fail("x is smaller than the kernel");
  check_map("grad", grad, {shape.batch, -1, shape.rows, shape.columns});
  shape.outputs = grad.size(1);
  shape.x = static_cast<const uint16_t*>(x.const_data_ptr());
  return shape;
}

inline Tensor new_weight_gradient(const ConvShape& shape) {
  return torch::stable::empty(
      {shape.outputs, shape.channels, 3, 3}, ScalarType::Float, std::nullopt, std::nullopt,
      std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Checks the arguments, allocates the result and calls `run(shape, packed weights)`.
template <class Run>
Tensor convolve(
    const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
    int64_t activation, double negative_slope, int64_t packed_size, Run run) {
  const int64_t channels = geometry[1];
  check_map("x", x, {-1, channels, -1, -1});
  ConvShape shape{};
  shape.batch = x.size(0), shape.height = x.size(2), shape.width = x.size(3);
  shape.channels = channels, shape.outputs = geometry[0];
  shape.kernel_h = geometry[2], shape.kernel_w = geometry[3];
  shape.stride_h = geometry[4], shape.stride_w = geometry[5];
  shape.padding_h = geometry[6], shape.padding_w = geometry[7];
  shape.activation = activation, shape.negative_slope = static_cast<float>(negative_slope);
  if (shape.stride_h < 1 || shape.stride_w < 1 || shape.padding_h < 0 || shape.padding_w < 0)
    fail("geometry ", shape_name(geometry), " has a stride below 1 or a padding below 0");
  check_activation(activation);
  const int64_t rows = shape.height + 2 * shape.padding_h - shape.kernel_h;
  const int64_t columns = shape.width + 2 * shape.padding_w - shape.kernel_w;
  if (rows < 0 || columns < 0) fail("x is smaller than the kernel");
  shape.rows = rows / shape.stride_h + 1, shape.columns = columns / shape.stride_w + 1;
  check_packed(packed, packed_size);
  shape.plain = !bias && !residual && activation == kNone;

  const std::vector<int64_t> sizes{shape.batch, shape.outputs, shape.rows, shape.columns};
  if (residual) {
    check_map("residual", *residual, sizes);
    shape.residual = static_cast<const uint16_t*>(residual->const_data_ptr());
  }
  thread_local Workspace<float> workspace;
  float* biases = workspace.get(shape.panels() * kPanel);
  std::fill(biases, biases + shape.panels() * kPanel, 0.0f);
  if (bias) {
    if (bias->scalar_type() != ScalarType::Float || bias->dim() != 1 ||
        bias->size(0) != shape.outputs || !bias->is_contiguous() || !bias->is_cpu())
      fail("bias is ", dtype_name(bias->scalar_type()), " ", shape_name(bias->sizes()),
           "; expected torch.float32 [", shape.outputs, "], contiguous, on the CPU");
    std::memcpy(biases, bias->const_data_ptr(), sizeof(float) * shape.outputs);
  }
  Tensor out = new_result(shape);
  shape.x = static_cast<const uint16_t*>(x.const_data_ptr());
  shape.bias = biases;
  shape.out = static_cast<uint16_t*>(out.mutable_data_ptr());
  run(shape, static_cast<const uint16_t*>(packed.const_data_ptr()));
  return out;
}

// For 3x3 kernels.
inline void check_geometry(const std::vector<int64_t>& geometry) {
  if (geometry.size() != 8 || *std::min_element(geometry.begin(), geometry.begin() + 6) < 1 ||
      geometry[2] != 3 || geometry[3] != 3 || geometry[4] > 2 || geometry[5] != geometry[4])
    fail("geometry is ", shape_name(geometry),
         "; expected K, C, 3, 3, two strides that are both 1 or both 2, and two paddings");
}

// Calls `add(lane, share)` for each lane: in parallel if there are enough lanes, otherwise one by
// one with a `share` that parallelizes the work inside, as share_all does.
template <class Add>
void deal_lanes(int64_t lanes, Add add) {
  if (lanes < torch::stable::get_num_threads()) {
    for (int64_t lane = 0; lane < lanes; ++lane)
      add(lane, [](int64_t count, int64_t unit, auto work) { share_all(count, unit, work); });
    return;
  }
  share_all(lanes, [&](int64_t first, int64_t last) {
    for (int64_t lane = first; lane < last; ++lane)
      add(lane, [](int64_t count, int64_t, auto work) { work(int64_t{0}, count); });
  });
}

// Calls `part(first row, last row, first panel, last panel)` on the threads. Many rows are divided
// into parts of at least `unit`; if the weights are larger, their panels are divided instead, one
// part per thread, because every part reads all rows.
template <class Part>
void share_out(int64_t rows, int64_t unit, const ConvShape& shape, Part part) {
  const int64_t threads = torch::stable::get_num_threads(), panels = shape.panels();
  if (shape.outputs <= rows || panels < threads) {
    share_all(rows, unit, [&](int64_t a, int64_t b) { part(a, b, int64_t{0}, panels); });
    return;
  }
  torch::stable::parallel_for(0, panels, ceil_div(panels, threads), [&](int64_t a, int64_t b) {
    part(int64_t{0}, rows, a, b);
  });
}

} // namespace resfast

#endif
