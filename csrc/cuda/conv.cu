// resfast::conv2d_bias_act on CUDA; its schema and what it means stand in resfast/kernels/conv.py.
//
// resfast::conv2d_cuda is the same with the choice made by the caller, for an autotuner and for
// tests: tile and splits of resfast::conv2d_cuda_candidates, and whether float32 is rounded to
// TF32.

#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cpu/check.h"
#include "conv_kernels.cuh"

namespace resfast {
namespace {

using conv::Activation;
using conv::Problem;
using torch::headeronly::MemoryFormat;

using MaybeTensor = std::optional<Tensor>;
using Pair = std::vector<int64_t>;

constexpr const char* kActivations[] = {"none", "relu", "leaky_relu", "silu"};

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, " failed: ", cudaGetErrorString(error));
}

// Arguments of the operator but for x and weight.
struct Options {
  const MaybeTensor& bias;
  const MaybeTensor& residual;
  const Pair& stride;
  const Pair& padding;
  const std::string& activation;
};

int64_t output_side(int64_t side, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t room = side + 2 * padding - kernel;
  return room < 0 ? 0 : room / stride + 1;
}

int narrow(int64_t value, const char* what) {
  if (value > std::numeric_limits<int>::max() / 2)
    fail(what, " is ", value, "; the CUDA kernel takes at most 2^30");
  return static_cast<int>(value);
}

Activation parse_activation(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kActivations[i]) return static_cast<Activation>(i);
  fail("activation '", name, "' is unknown; expected one of none, relu, leaky_relu, silu");
}

// The sizes, after everything about the arguments is checked but the device of x.
Problem check(const Tensor& x, const Tensor& weight, const Options& options) {
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
        weight.size(1), "; they must be the same (groups are not supported)");
  for (auto [name, pair, least] :
       {std::tuple{"stride", &options.stride, 1}, std::tuple{"padding", &options.padding, 0}})
    if (pair->size() != 2 || (*pair)[0] < least || (*pair)[1] < least)
      fail(name, " is ", shape_name(*pair), "; expected two numbers of at least ", least);
  parse_activation(options.activation);

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

  // Positions are 32-bit: of pixels, in the reduction, and of 16-byte vectors in x and weight.
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

bool aligned_to_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int multiprocessors(int device) {
  static std::atomic<int> known[64];
  const bool keep = device < 64;
  int count = keep ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check_cuda(
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
    if (keep) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

int value_bytes(const Tensor& x) { return static_cast<int>(x.element_size()); }

Tensor convolve(
    const Tensor& given_x, const Tensor& given_weight, const Options& options, int64_t tile,
    int64_t splits, bool tf32) {
  const Problem problem = check(given_x, given_weight, options);
  if (!given_x.is_cuda()) fail("x is not on a CUDA device");
  const int device = static_cast<int>(given_x.get_device_index());
  torch::stable::accelerator::DeviceGuard guard(device);

  const ScalarType dtype = given_x.scalar_type();
  Tensor out = torch::stable::empty(
      {problem.batch, problem.filters, problem.out_height, problem.out_width}, dtype, std::nullopt,
      given_x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  if (problem.batch == 0) return out;
  const Tensor x = torch::stable::contiguous(given_x, MemoryFormat::ChannelsLast);
  const Tensor weight = torch::stable::contiguous(given_weight, MemoryFormat::ChannelsLast);
  MaybeTensor bias, residual;
  if (options.bias) bias = torch::stable::contiguous(*options.bias);
  if (options.residual)
    residual = torch::stable::contiguous(*options.residual, MemoryFormat::ChannelsLast);

  const int bytes = value_bytes(x), vector = 16 / bytes;
  const bool aligned = problem.channels % vector == 0 && aligned_to_16(x.const_data_ptr()) &&
                       aligned_to_16(weight.const_data_ptr());
  const bool vector_store = problem.filters % vector == 0 &&
                            aligned_to_16(out.const_data_ptr()) &&
                            (!residual || aligned_to_16(residual->const_data_ptr()));
  if (tile < 0) {
    const conv::Candidate best =
        conv::candidates(problem, bytes, aligned, multiprocessors(device)).front();
    tile = best.tile;
    splits = best.splits;
  }
  if (tile >= conv::kTileCount || !conv::has_tile(static_cast<int>(tile), bytes, aligned))
    fail("tile ", tile, " is not compiled for this dtype and these channels");
  if (splits < 1 || splits > conv::depth_blocks(problem, static_cast<int>(tile), bytes))
    fail("splits ", splits, " is out of range for tile ", tile);

  conv::Params params = conv::make_params(
      problem, static_cast<int>(tile), static_cast<int>(splits), bytes,
      parse_activation(options.activation), vector_store);
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  params.residual = residual ? residual->const_data_ptr() : nullptr;
  params.out = out.mutable_data_ptr();
  MaybeTensor partial; // given back to the allocator of this stream
  if (params.splits > 1) {
    partial = torch::stable::empty(
        {params.splits, params.pixels, params.partial_pitch}, ScalarType::Float, std::nullopt,
        given_x.device());
    params.partial = static_cast<float*>(partial->mutable_data_ptr());
  }

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto launch = dtype == ScalarType::BFloat16 ? conv::launch_bf16
                      : dtype == ScalarType::Half   ? conv::launch_fp16
                      : tf32                        ? conv::launch_tf32
                                                    : conv::launch_fp32;
  check_cuda(
      launch(params, static_cast<int>(tile), aligned, device, static_cast<cudaStream_t>(stream)),
      "the launch of resfast::conv2d_bias_act");
  return out;
}

// RESFAST_TF32=1 lets float32 be rounded to TF32, as torch.backends.cudnn.allow_tf32 does for cuDNN
// (which the stable ABI cannot be asked).
bool tf32_by_default() {
  const char* value = std::getenv("RESFAST_TF32");
  return value && std::strcmp(value, "1") == 0;
}

Tensor conv2d_bias_act(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const Pair& stride, const Pair& padding, const std::string& activation) {
  return convolve(
      x, weight, {bias, residual, stride, padding, activation}, -1, 0, tf32_by_default());
}

Tensor conv2d_cuda(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const Pair& stride, const Pair& padding, const std::string& activation, int64_t tile,
    int64_t splits, bool tf32) {
  return convolve(x, weight, {bias, residual, stride, padding, activation}, tile, splits, tf32);
}

// (tile, splits) of every way to compute it, best first by the model of conv_plan.h, in one list.
std::vector<int64_t> conv2d_cuda_candidates(
    const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
    int64_t processors) {
  const std::string activation = "none";
  const Problem problem =
      check(x, weight, {std::nullopt, std::nullopt, stride, padding, activation});
  const int bytes = value_bytes(x);
  std::vector<int64_t> flat;
  for (const conv::Candidate& one : conv::candidates(
           problem, bytes, problem.channels % (16 / bytes) == 0,
           static_cast<int>(std::max<int64_t>(1, processors)))) {
    flat.push_back(one.tile);
    flat.push_back(one.splits);
  }
  return flat;
}

} // namespace
} // namespace resfast

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def(
      "conv2d_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, "
      "int[2] padding, str activation, int tile, int splits, bool tf32) -> Tensor");
  m.def(
      "conv2d_cuda_candidates(Tensor x, Tensor weight, int[2] stride, int[2] padding, "
      "int multiprocessors) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CUDA, m) {
  m.impl("conv2d_bias_act", TORCH_BOX(&resfast::conv2d_bias_act));
  m.impl("conv2d_cuda", TORCH_BOX(&resfast::conv2d_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("conv2d_cuda_candidates", TORCH_BOX(&resfast::conv2d_cuda_candidates));
}
