// resfast::conv2d_hopper: resfast::conv2d_bias_act for GPUs of compute capability 9.0, in one of
// the configurations of hopper_plan.h. resfast::conv2d_hopper_configs lists them, the best guess
// first.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../conv/conv_arguments.h"
#include "hopper.h"

namespace resfast::hopper {
namespace {

using conv::MaybeTensor;
using conv::Options;
using conv::Pair;

// The code is compiled for sm_90a, which runs on no other GPU.
bool is_hopper(int device) {
  return conv::device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9 &&
         conv::device_attribute(cudaDevAttrComputeCapabilityMinor, device) == 0;
}

bool has_type(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

Tensor convolve(
    const Tensor& given_x, const Tensor& given_weight, const Options& options, int64_t config) {
  const Problem problem = conv::check(given_x, given_weight, options);
  const ScalarType dtype = given_x.scalar_type();
  if (!has_type(dtype))
    fail("x is ", dtype_name(dtype), "; the kernel for Hopper takes torch.bfloat16, torch.float16");
  if (config < 0 || config >= kConfigCount)
    fail("config is ", config, "; expected one of resfast::conv2d_hopper_configs");
  if (const std::string reason = obstacle(problem); !reason.empty()) fail(reason);
  if (!given_x.is_cuda()) fail("x is not on a CUDA device");
  const int device = static_cast<int>(given_x.get_device_index());
  if (!is_hopper(device))
    fail("x is on a GPU that is not of compute capability 9.0, which this kernel is compiled for");
  torch::stable::accelerator::DeviceGuard guard(device);

  Tensor out = torch::stable::empty(
      {problem.batch, problem.filters, problem.out_height, problem.out_width}, dtype, std::nullopt,
      given_x.device(), std::nullopt, conv::MemoryFormat::ChannelsLast);
  const Tensor x = conv::ready(given_x), weight = conv::ready(given_weight);
  MaybeTensor bias, residual, workspace; // returned to the allocator of this stream
  if (options.bias) bias = torch::stable::contiguous(*options.bias);
  if (options.residual) residual = conv::ready(*options.residual);

  Call call{};
  call.problem = problem;
  call.x = x.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  call.residual = residual ? residual->const_data_ptr() : nullptr;
  call.out = out.mutable_data_ptr();
  call.activation = conv::parse_activation(options.activation);
  call.negative_slope = static_cast<float>(options.negative_slope);
  call.multiprocessors = conv::device_attribute(cudaDevAttrMultiProcessorCount, device);
  call.stream = conv::current_stream(device);
  call.workspace = [&](size_t bytes) {
    workspace = torch::stable::empty(
        {static_cast<int64_t>(bytes)}, ScalarType::Byte, std::nullopt, given_x.device());
    return workspace->mutable_data_ptr();
  };
  const bool pingpong = kConfigs[config].schedule == Schedule::kPingpong;
  const auto launch = dtype == ScalarType::BFloat16
                          ? (pingpong ? launch_bf16_pingpong : launch_bf16_cooperative)
                          : (pingpong ? launch_fp16_pingpong : launch_fp16_cooperative);
  conv::check_cuda(
      launch(call, static_cast<int>(config)), "the launch of resfast::conv2d_hopper");
  return out;
}

Tensor conv2d_hopper(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const Pair& stride, const Pair& padding, const std::string& activation,
    double negative_slope, int64_t config) {
  return convolve(
      x, weight, {bias, residual, stride, padding, activation, negative_slope}, config);
}

std::vector<int64_t> conv2d_hopper_configs(
    const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding) {
  const std::string activation = "none";
  const Problem problem =
      conv::check(x, weight, {std::nullopt, std::nullopt, stride, padding, activation, 0});
  const bool possible = has_type(x.scalar_type()) && obstacle(problem).empty() &&
                        (!x.is_cuda() || is_hopper(static_cast<int>(x.get_device_index())));
  return possible ? candidates(problem) : std::vector<int64_t>{};
}

} // namespace
} // namespace resfast::hopper

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def(
      "conv2d_hopper(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, "
      "int[2] padding, str activation, float negative_slope, int config) -> Tensor");
  m.def(
      "conv2d_hopper_configs(Tensor x, Tensor weight, int[2] stride, int[2] padding) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CUDA, m) {
  m.impl("conv2d_hopper", TORCH_BOX(&resfast::hopper::conv2d_hopper));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("conv2d_hopper_configs", TORCH_BOX(&resfast::hopper::conv2d_hopper_configs));
}
