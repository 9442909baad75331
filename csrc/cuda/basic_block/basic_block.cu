// The CUDA kernel of resfast::basic_block (documented in resfast/ops/basic_block/op.py):
// resfast::basic_block_cuda takes a tile and a cluster size, listed by
// resfast::basic_block_cuda_candidates.

#include <atomic>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "basic_block.cuh"
#include "../conv/conv_arguments.h"

namespace resfast::basic_block {
namespace {

using conv::MaybeTensor;
using conv::check_cuda;

// Two blocks per multiprocessor if a thread does not hold too many sums.
template <class Type, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kWarpM * Tile::kWarpN > 1024 ? 1 : 2)
    basic_block_kernel(const __grid_constant__ Params params) {
  basic_block<Type, Tile>(params);
}

template <class Type, class Tile>
void launch_tile(const Params& params, int cluster, int device, cudaStream_t stream) {
  constexpr auto kernel = basic_block_kernel<Type, Tile>;
  static std::atomic<uint64_t> prepared{0}; // one bit per device
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (device > 63 || !(prepared.load(std::memory_order_relaxed) & bit)) {
    check_cuda(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
            conv::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        "cudaFuncSetAttribute");
    prepared.fetch_or(bit, std::memory_order_relaxed);
  }
  const Layout layout(
      params.channels, params.images * params.height * params.width,
      Tile::kStages * Tile::kStageBytes);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(params.batch, params.images) * cluster));
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(layout.total);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check_cuda(
      cudaLaunchKernelEx(&config, kernel, params), "the launch of resfast::basic_block_cuda");
}

template <class Type>
void launch(const Params& params, int tile, int cluster, int device, cudaStream_t stream) {
#define RESFAST_LAUNCH(index, unused) \
  if (tile == index)                  \
    return launch_tile<Type, TileAt<index>::Type>(params, cluster, device, stream);
  RESFAST_BLOCK_TILES(RESFAST_LAUNCH)
#undef RESFAST_LAUNCH
}

// Maximum number of blocks in a cluster on the current device: code for sm_80 has no clusters even
// on a newer GPU.
int most_cluster(int device) {
  if (conv::device_attribute(cudaDevAttrComputeCapabilityMajor, device) < 9) return 1;
  cudaFuncAttributes code;
  if (cudaFuncGetAttributes(&code, basic_block_kernel<conv::Bf16, TileAt<0>::Type>) !=
      cudaSuccess) {
    cudaGetLastError(); // no code for this GPU: the launch will report it
    return 1;
  }
  return code.ptxVersion >= 90 && code.binaryVersion >= 90 ? 8 : 1;
}

Problem problem_of(const Tensor& x) {
  if (x.dim() != 4) fail("x is ", shape_name(x.sizes()), "; expected [N, C, H, W]");
  return {
      conv::narrow(x.size(0), "the batch"), conv::narrow(x.size(2), "the height"),
      conv::narrow(x.size(3), "the width"), conv::narrow(x.size(1), "the number of channels")};
}

Tensor run(
    const Tensor& given_x, const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2,
    const MaybeTensor& bias2, const std::string& activation, double negative_slope, int64_t tile,
    int64_t cluster) {
  const conv::Pair one{1, 1};
  const MaybeTensor none, residual = given_x;
  conv::check(given_x, weight1, {bias1, none, one, one, activation, negative_slope});
  conv::check(given_x, weight2, {bias2, residual, one, one, activation, negative_slope});
  const ScalarType dtype = given_x.scalar_type();
  if (dtype == ScalarType::Float)
    fail("x is torch.float32; expected one of torch.bfloat16, torch.float16");
  const Problem problem = problem_of(given_x);
  for (const Tensor* weight : {&weight1, &weight2})
    if (weight->size(0) != problem.channels || weight->size(2) != 3 || weight->size(3) != 3)
      fail(
          "weight is ", shape_name(weight->sizes()), "; expected 3x3 and as many filters as the ",
          problem.channels, " channels of x");
  if (activation != "relu" && activation != "leaky_relu")
    fail("activation '", activation, "' is not in the block; expected relu or leaky_relu");
  if (tile < 0 || tile >= kTileCount)
    fail("tile ", tile, " is unknown; expected 0 to ", kTileCount - 1);
  if (!given_x.is_cuda()) fail("x is not on a CUDA device");
  const int device = static_cast<int>(given_x.get_device_index());
  torch::stable::accelerator::DeviceGuard guard(device);
  if (cluster < 1 || (cluster & (cluster - 1)) || cluster > most_cluster(device) ||
      problem.channels % (16 * cluster))
    fail(
        "cluster is ", cluster, " for ", problem.channels, " channels; expected 1, or from sm_90 ",
        "on 2, 4 or 8, and a multiple of 16 channels for each block");
  Tensor out = torch::stable::empty(
      {problem.batch, problem.channels, problem.height, problem.width}, dtype, std::nullopt,
      given_x.device(), std::nullopt, conv::MemoryFormat::ChannelsLast);
  if (problem.batch == 0) return out;

  Params params{};
  params.images = images_per_cluster(
      problem, static_cast<int>(tile),
      conv::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (params.images == 0)
    fail(
        "tile ", tile, " needs more shared memory than this GPU has for x of ",
        shape_name(given_x.sizes()), "; use two convolutions");
  const Tensor x = conv::ready(given_x), weights[] = {conv::ready(weight1), conv::ready(weight2)};
  MaybeTensor biases[2];
  if (bias1) biases[0] = torch::stable::contiguous(*bias1);
  if (bias2) biases[1] = torch::stable::contiguous(*bias2);
  params.x = x.const_data_ptr();
  for (int i = 0; i < 2; ++i) {
    params.weight[i] = weights[i].const_data_ptr();
    params.bias[i] = biases[i] ? static_cast<const float*>(biases[i]->const_data_ptr()) : nullptr;
  }
  params.out = out.mutable_data_ptr();
  params.batch = problem.batch;
  params.height = problem.height;
  params.width = problem.width;
  params.channels = problem.channels;
  params.activation = conv::parse_activation(activation);
  params.negative_slope = static_cast<float>(negative_slope);
  const auto launch_type = dtype == ScalarType::BFloat16 ? launch<conv::Bf16> : launch<conv::Fp16>;
  launch_type(
      params, static_cast<int>(tile), static_cast<int>(cluster), device,
      conv::current_stream(device));
  return out;
}

// (tile, cluster) of the candidates worth measuring, in one list, best first by the model of
// basic_block_plan.h.
std::vector<int64_t> list_candidates(const Tensor& x) {
  if (!x.is_cuda()) fail("x is not on a CUDA device");
  const int device = static_cast<int>(x.get_device_index());
  torch::stable::accelerator::DeviceGuard guard(device);
  const Gpu gpu{
      conv::device_attribute(cudaDevAttrMultiProcessorCount, device),
      conv::device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), most_cluster(device)};
  std::vector<int64_t> flat;
  for (const Candidate& one : candidates(problem_of(x), gpu)) {
    flat.push_back(one.tile);
    flat.push_back(one.cluster);
  }
  return flat;
}

} // namespace
} // namespace resfast::basic_block

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def(
      "basic_block_cuda(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, "
      "str activation, float negative_slope, int tile, int cluster) -> Tensor");
  m.def("basic_block_cuda_candidates(Tensor x) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CUDA, m) {
  m.impl("basic_block_cuda", TORCH_BOX(&resfast::basic_block::run));
  m.impl("basic_block_cuda_candidates", TORCH_BOX(&resfast::basic_block::list_candidates));
}
