// The CUDA kernel of resfast::conv2d_bias_act (documented in resfast/ops/conv/op.py):
// resfast::conv2d_cuda takes a tile and a number of splits, listed by
// resfast::conv2d_cuda_candidates, and whether to round float32 to TF32;
// resfast::conv2d_epilogue_ applies the epilogue to a cuDNN convolution. The algorithm is chosen in
// resfast/ops/conv/cuda.py.

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "conv_arguments.h"
#include "conv_kernels.cuh"

namespace resfast {
namespace {

using conv::MaybeTensor;
using conv::Options;
using conv::Pair;
using conv::Problem;

int value_bytes(const Tensor& x) { return static_cast<int>(x.element_size()); }

// Launches on the current stream of the current device.
void launch(
    const conv::Params& params, int tile, bool aligned, ScalarType dtype, bool tf32, int device) {
  const auto launch_type = dtype == ScalarType::BFloat16 ? conv::launch_bf16
                           : dtype == ScalarType::Half   ? conv::launch_fp16
                           : tf32                        ? conv::launch_tf32
                                                         : conv::launch_fp32;
  conv::check_cuda(
      launch_type(params, tile, aligned, device, conv::current_stream(device)),
      "the launch of the CUDA kernel");
}

Tensor convolve(
    const Tensor& given_x, const Tensor& given_weight, const Options& options, int64_t tile,
    int64_t splits, bool tf32) {
  const Problem problem = conv::check(given_x, given_weight, options);
  if (!given_x.is_cuda()) fail("x is not on a CUDA device");
  const int device = static_cast<int>(given_x.get_device_index());
  torch::stable::accelerator::DeviceGuard guard(device);

  const ScalarType dtype = given_x.scalar_type();
  Tensor out = torch::stable::empty(
      {problem.batch, problem.filters, problem.out_height, problem.out_width}, dtype, std::nullopt,
      given_x.device(), std::nullopt, conv::MemoryFormat::ChannelsLast);
  if (problem.batch == 0) return out;
  const bool aligned = given_x.size(1) % (16 / value_bytes(given_x)) == 0;
  auto prepare = aligned ? conv::ready : conv::to_channels_last;
  const Tensor x = prepare(given_x), weight = prepare(given_weight);
  MaybeTensor bias, residual;
  if (options.bias) bias = torch::stable::contiguous(*options.bias);
  if (options.residual) residual = conv::to_channels_last(*options.residual);

  const int bytes = value_bytes(x), vector = 16 / bytes;
  const bool vector_store = problem.filters % vector == 0 &&
                            conv::aligned_to_16(out.const_data_ptr()) &&
                            (!residual || conv::aligned_to_16(residual->const_data_ptr()));
  if (tile >= conv::kTileCount || !conv::has_tile(static_cast<int>(tile), bytes, aligned))
    fail("tile ", tile, " is not compiled for this dtype and these channels");
  if (splits < 1 || splits > conv::depth_blocks(problem, static_cast<int>(tile), bytes))
    fail("splits ", splits, " is out of range for tile ", tile);

  conv::Params params = conv::make_params(
      problem, static_cast<int>(tile), static_cast<int>(splits), bytes,
      conv::parse_activation(options.activation), static_cast<float>(options.negative_slope),
      vector_store);
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  params.residual = residual ? residual->const_data_ptr() : nullptr;
  params.out = out.mutable_data_ptr();
  MaybeTensor partial; // returned to the allocator of this stream
  if (params.splits > 1) {
    partial = torch::stable::empty(
        {params.splits, params.pixels, params.partial_pitch}, ScalarType::Float, std::nullopt,
        given_x.device());
    params.partial = static_cast<float*>(partial->mutable_data_ptr());
  }

  launch(params, static_cast<int>(tile), aligned, dtype, tf32, device);
  return out;
}

Tensor conv2d_cuda(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const Pair& stride, const Pair& padding, const std::string& activation,
    double negative_slope, int64_t tile, int64_t splits, bool tf32) {
  return convolve(
      x, weight, {bias, residual, stride, padding, activation, negative_slope}, tile, splits,
      tf32);
}

Tensor conv2d_epilogue(
    Tensor out, const MaybeTensor& bias, const MaybeTensor& given_residual,
    const std::string& activation, double negative_slope) {
  const ScalarType dtype = out.scalar_type();
  if (!out.is_cuda() || out.dim() != 4 || !conv::is_channels_last(out) ||
      (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half))
    fail(
        "out is ", dtype_name(dtype), " ", shape_name(out.sizes()),
        "; expected float32, bfloat16 or float16 [N, K, P, Q] in channels_last on CUDA");
  if (bias && (bias->scalar_type() != ScalarType::Float || bias->numel() != out.size(1) ||
               bias->device() != out.device()))
    fail("bias must be float32 [", out.size(1), "] on out's device");
  if (given_residual &&
      (given_residual->scalar_type() != dtype || given_residual->device() != out.device() ||
       !given_residual->sizes().equals(out.sizes())))
    fail("residual must be like out, ", dtype_name(dtype), " ", shape_name(out.sizes()));
  const int device = static_cast<int>(out.get_device_index());
  torch::stable::accelerator::DeviceGuard guard(device);
  if (out.numel() == 0) return out;
  Problem problem{};
  problem.batch = conv::narrow(out.size(0) * out.size(2) * out.size(3), "the number of pixels");
  problem.filters = conv::narrow(out.size(1), "the number of filters");
  problem.out_height = problem.out_width = 1;
  MaybeTensor ready_bias, residual;
  if (bias) ready_bias = torch::stable::contiguous(*bias);
  if (given_residual) residual = conv::to_channels_last(*given_residual);
  const int bytes = value_bytes(out);
  const bool vector_store = problem.filters % (16 / bytes) == 0 &&
                            conv::aligned_to_16(out.const_data_ptr()) &&
                            (!residual || conv::aligned_to_16(residual->const_data_ptr()));
  conv::Params params = conv::make_params(
      problem, conv::kEpilogueOnly, 0, bytes, conv::parse_activation(activation),
      static_cast<float>(negative_slope), vector_store);
  params.bias = bias ? static_cast<const float*>(ready_bias->const_data_ptr()) : nullptr;
  params.residual = residual ? residual->const_data_ptr() : nullptr;
  params.out = out.mutable_data_ptr();
  launch(params, conv::kEpilogueOnly, true, dtype, false, device);
  return out;
}

// (tile, splits) of all candidates, in one list, best first by the model of conv_plan.h.
std::vector<int64_t> conv2d_cuda_candidates(
    const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
    int64_t processors) {
  const std::string activation = "none";
  const Problem problem =
      conv::check(x, weight, {std::nullopt, std::nullopt, stride, padding, activation, 0});
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
      "int[2] padding, str activation, float negative_slope, int tile, int splits, bool tf32) "
      "-> Tensor");
  m.def(
      "conv2d_epilogue_(Tensor(a!) out, Tensor? bias, Tensor? residual, str activation, "
      "float negative_slope) -> Tensor(a!)");
  m.def(
      "conv2d_cuda_candidates(Tensor x, Tensor weight, int[2] stride, int[2] padding, "
      "int multiprocessors) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CUDA, m) {
  m.impl("conv2d_cuda", TORCH_BOX(&resfast::conv2d_cuda));
  m.impl("conv2d_epilogue_", TORCH_BOX(&resfast::conv2d_epilogue));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("conv2d_cuda_candidates", TORCH_BOX(&resfast::conv2d_cuda_candidates));
}
