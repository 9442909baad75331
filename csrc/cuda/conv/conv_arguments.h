// Arguments of the CUDA convolution operators: their checks and conversion to kernel parameters.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/check.h"
#include "conv_plan.h"

namespace resfast::conv {

using torch::headeronly::MemoryFormat;
using MaybeTensor = std::optional<Tensor>;
using Pair = std::vector<int64_t>;

inline constexpr const char* kActivations[] = {"none", "relu", "leaky_relu", "silu", "gelu"};

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, " failed: ", cudaGetErrorString(error));
}

// Arguments of the operator other than x and weight.
struct Options {
  const MaybeTensor& bias;
  const MaybeTensor& residual;
  const Pair& stride;
  const Pair& padding;
  const std::string& activation;
  double negative_slope;
};

inline int64_t output_side(int64_t side, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t room = side + 2 * padding - kernel;
  return room < 0 ? 0 : room / stride + 1;
}

inline int narrow(int64_t value, const char* what) {
  if (value > std::numeric_limits<int>::max() / 2)
    fail(what, " is ", value, "; the CUDA kernel takes at most 2^30");
  return static_cast<int>(value);
}

inline Activation parse_activation(const std::string& name) {
  int number = 0;
  for (const char* known : kActivations) {
    if (name == known) return static_cast<Activation>(number);
    ++number;
  }
  fail("activation '", name, "' is unknown; expected one of none, relu, leaky_relu, silu, gelu");
}

// Checks all arguments except the device of x and returns the sizes.
inline Problem check(const Tensor& x, const Tensor& weight, const Options& options) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail(
        "x is ", dtype_name(dtype),
        "; expected one of torch.float32, torch.bfloat16, torch.float16");
  auto like = [&](const char* name, const Tensor& tensor, ScalarType expected, const char* why) {
    if (tensor.scalar_type() != expected)
      fail(
          name, " is ", dtype_name(tensor.scalar_type()), "; expected ", dtype_name(expected), why);
    if (tensor.device() != x.device())
      fail(name, " is on another device than x; expected the same");
  };
  like("weight", weight, dtype, ", like x");
  if (options.bias) like("bias", *options.bias, ScalarType::Float, "");
  if (options.residual) like("residual", *options.residual, dtype, ", like x");
  if (x.dim() != 4) fail("x is ", shape_name(x.sizes()), "; expected [N, C, H, W]");
  if (weight.dim() != 4 || weight.numel() == 0)
    fail("weight is ", shape_name(weight.sizes()), "; expected [K, C, R, S], none of them 0");
  if (x.size(1) != weight.size(1))
    fail(
        "x has ", x.size(1), " channels, and weight ", shape_name(weight.sizes()), " is for ",
        weight.size(1), "; they must be the same");
  for (auto [name, pair, least] :
       {std::tuple{"stride", &options.stride, 1}, std::tuple{"padding", &options.padding, 0}})
    if (pair->size() != 2 || (*pair)[0] < least || (*pair)[1] < least)
      fail(name, " is ", shape_name(*pair), "; expected two numbers of at least ", least);
  parse_activation(options.activation);
  if (!std::isfinite(options.negative_slope))
    fail("negative_slope is ", options.negative_slope, "; expected a finite number");

  Problem problem{};
  const Pair &stride = options.stride, &padding = options.padding;
  problem.batch = narrow(x.size(0), "the batch");
  problem.channels = narrow(x.size(1), "the number of channels");
  problem.height = narrow(x.size(2), "the height");
  problem.width = narrow(x.size(3), "the width");
  problem.filters = narrow(weight.size(0), "the number of filters");
  problem.kernel_h = narrow(weight.size(2), "the kernel's height");
  problem.kernel_w = narrow(weight.size(3), "the kernel's width");
  problem.stride_h = narrow(stride[0], "stride");
  problem.stride_w = narrow(stride[1], "stride");
  problem.padding_h = narrow(padding[0], "padding");
  problem.padding_w = narrow(padding[1], "padding");
  const int64_t height = output_side(x.size(2), weight.size(2), stride[0], padding[0]);
  const int64_t width = output_side(x.size(3), weight.size(3), stride[1], padding[1]);
  if (height < 1 || width < 1)
    fail(
        "images of ", x.size(2), "x", x.size(3), " with padding ", shape_name(padding),
        " are smaller than the kernel of ", weight.size(2), "x", weight.size(3));
  problem.out_height = narrow(height, "the result's height");
  problem.out_width = narrow(width, "the result's width");
  const Pair bias_shape{weight.size(0)}, shape{x.size(0), weight.size(0), height, width};
  auto shaped = [](const Tensor& tensor, const Pair& expected) {
    if (tensor.dim() != static_cast<int64_t>(expected.size())) return false;
    for (size_t i = 0; i < expected.size(); ++i)
      if (tensor.size(static_cast<int64_t>(i)) != expected[i]) return false;
    return true;
  };
  if (options.bias && !shaped(*options.bias, bias_shape))
    fail("bias is ", shape_name(options.bias->sizes()), "; expected ", shape_name(bias_shape));
  if (options.residual && !shaped(*options.residual, shape))
    fail(
        "residual is ", shape_name(options.residual->sizes()), "; expected ", shape_name(shape),
        ", like the result");

  // Indices of pixels, of the reduction, and of 16-byte vectors in x and weight are 32-bit.
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t vector = 16 / static_cast<int64_t>(x.element_size());
  const int64_t padded = (x.size(2) + 2 * padding[0]) * (x.size(3) + 2 * padding[1]);
  if (problem.pixels() > kMost || problem.depth() > kMost ||
      (problem.pixels() / 16 + 1) * (problem.filters / 32 + 1) > kMost || // thread blocks
      (problem.filters + 256) * problem.depth() / vector > kMost ||
      (x.numel() + padded * x.size(1)) / vector > kMost)
    fail(
        "x ", shape_name(x.sizes()), " with weight ", shape_name(weight.sizes()),
        " is too large for the CUDA kernel's 32-bit positions; split the batch");
  return problem;
}

inline bool aligned_to_16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Dimensions of size 1 may have any stride.
inline bool is_channels_last(const Tensor& tensor) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

inline Tensor to_channels_last(const Tensor& tensor) { // without a call to torch if it already is
  return is_channels_last(tensor) ? tensor
                                  : torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// In channels_last memory on a 16-byte boundary, which a view may not be.
inline Tensor ready(const Tensor& tensor) {
  Tensor result = to_channels_last(tensor);
  return aligned_to_16(result.const_data_ptr()) ? result : torch::stable::clone(result);
}

inline int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// torch's current stream on a device.
inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

} // namespace resfast::conv
