// The convolution with Hopper's own instructions: the GEMM kernels of CUTLASS for sm_90a (TMA,
// wgmma, warp specialization, persistent or stream-K thread blocks), with the pixel loads of its
// convolution (TMA in im2col mode).
//
// CUTLASS 4.2 supports its own convolution on sm_90 only with one tile per thread block, whose
// epilogue leaves the tensor cores idle. As a GEMM, pixels are rows (M), filters columns (N), and
// the reduction runs over (C, S, R); the result is a plain matrix [N * P * Q, K].
#pragma once

#include <stdexcept>
#include <string>

#include <cudaTypedefs.h>
#include <cutlass/cuda_host_adapter.hpp>

namespace resfast::hopper {

// A driver function, looked up through the runtime, so that the library loads without libcuda.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr int kVersion = 12000; // the first CUDA version with tensor maps
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
    throw std::runtime_error(
        std::string("the CUDA driver has no ") + name + "; install one for CUDA 12 or newer");
  return reinterpret_cast<Function>(found);
}

inline CUresult accepted(CUresult result, const char* function) {
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(
        std::string(function) + " failed with CUresult " + std::to_string(result));
  return result;
}

} // namespace resfast::hopper

// Replaces CUTLASS's encoder, which looks the function up for every tensor map and ignores errors.
// The tests have their own encoders.
#ifndef RESFAST_ENCODER
#define RESFAST_ENCODER(function) \
  resfast::hopper::driver_function<PFN_##function##_v12000>(#function)
#endif
#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function)                     \
  [](auto... arguments) {                                              \
    static const auto encode = RESFAST_ENCODER(function);              \
    return resfast::hopper::accepted(encode(arguments...), #function); \
  }

// These two come first: the convolution headers need them but do not include them.
#include <cutlass/kernel_hardware_info.h>

#include <cute/tensor.hpp>

#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "hopper.h"

namespace resfast::hopper {

using cute::_0;
using cute::_1;
using cute::_2;
using cute::_3;
using cute::Int;
using cute::Shape;
using cute::Stride;
using conv::Activation;

// -- epilogue -------------------------------------------------------------------------------------

// The activation is chosen at run time: one kernel serves all of them.
struct ActivationArguments {
  Activation activation = Activation::kNone;
  float negative_slope = 0;
};

template <class T>
struct Activate { // for a single value: CUTLASS uses only its Arguments
  using Arguments = ActivationArguments;
};

template <int kSize>
struct Activate<cutlass::Array<float, kSize>> {
  using Arguments = ActivationArguments;
  using Values = cutlass::Array<float, kSize>;

  template <class Function>
  CUTLASS_HOST_DEVICE static Values each(Values values, Function function) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) values[i] = function(values[i]);
    return values;
  }

  CUTLASS_HOST_DEVICE Values operator()(const Values& values, const Arguments& arguments) const {
    // The comparisons are false for NaN, which is thereby kept.
    switch (arguments.activation) {
      case Activation::kRelu: return each(values, [](float v) { return v <= 0 ? 0.0f : v; });
      case Activation::kLeakyRelu: {
        const float slope = arguments.negative_slope;
        return each(values, [slope](float v) { return v <= 0 ? v * slope : v; });
      }
      case Activation::kSilu: return each(values, [](float v) { return v / (1 + expf(-v)); });
      case Activation::kGelu: // exact
        return each(values, [](float v) { return 0.5f * v * (1 + erff(v * 0.70710678f)); });
      default: return values;
    }
  }
};

// -- loads ----------------------------------------------------------------------------------------

// The convolution's main loop, with the interface of a GEMM's.
template <class Convolution>
struct Im2colMainloop : Convolution {
  using StrideA = Stride<int64_t, _1, _0>; // GEMM kernels use only the rank
  using StrideB = Stride<int64_t, _1, _0>;
  static constexpr int NumProducerThreadEvents = 1;

  struct Arguments {
    typename Convolution::ProblemShape convolution;
    typename Convolution::Arguments pointers;
  };
  using Params = typename Convolution::Params;

  template <class GemmShape>
  static Params to_underlying_arguments(
      const GemmShape&, const Arguments& arguments, void* workspace) {
    return Convolution::to_underlying_arguments(
        arguments.convolution, arguments.pointers, workspace);
  }

  template <class GemmShape>
  static bool can_implement(const GemmShape&, const Arguments& arguments) {
    return Convolution::can_implement(arguments.convolution, arguments.pointers);
  }

  // A GEMM's tensors have a mode for the batch of matrices, here of size 1.
  template <class Tensor>
  CUTLASS_HOST_DEVICE static auto with_batch(const Tensor& tensor) {
    return cute::make_tensor(
        tensor.data(), cute::append<5>(tensor.layout(), cute::Layout<_1, _0>{}));
  }

  template <class GemmShape>
  CUTLASS_DEVICE auto load_init(const GemmShape& shape, const Params& params) {
    auto [a, b] = Convolution::load_init(shape, params);
    return cute::make_tuple(with_batch(a), with_batch(b));
  }

  template <class A, class B, class Steps, class BlockCoord>
  CUTLASS_DEVICE void load(
      const Params& params, typename Convolution::MainloopPipeline pipeline,
      typename Convolution::PipelineState state, const cute::tuple<A, B>& tensors,
      const BlockCoord& block, Steps step, int step_count, int thread, uint32_t rank_in_cluster,
      typename Convolution::TensorStorage& shared) {
    using cute::_;
    const auto a = cute::get<0>(tensors)(_, _, _, _, _0{});
    const auto b = cute::get<1>(tensors)(_, _, _, _, _0{});
    // The kernel's iterator refers to extents that were temporary, and needs them for carries.
    const auto extents = cute::shape<3>(a);
    Convolution::load(
        params, pipeline, state, cute::make_tuple(a, b), block,
        cute::make_coord_iterator(*step, extents), step_count, thread, rank_in_cluster, shared);
  }
};

// -- kernel ---------------------------------------------------------------------------------------

template <class Element, int kConfig>
struct Kernel {
  static constexpr Config kShape = kConfigs[kConfig];
  static constexpr bool kPingpong = kShape.schedule == Schedule::kPingpong;
  using M = Int<kShape.m>;
  using N = Int<kShape.n>;
  using Cluster = Shape<Int<kShape.cluster>, _1, _1>;
  using Tile = Shape<M, N, Shape<Int<kChannelsPerStep>>>; // the last mode: (C, S, R)
  using FlatTile = Shape<M, N, Int<kChannelsPerStep>>;

  // activation(alpha * sum + beta * residual + bias)
  using Fusion = cutlass::epilogue::fusion::LinCombPerColBiasEltAct<
      Activate, Element, float, float, Element, float>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, FlatTile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element,
      cutlass::layout::RowMajor, 8, Element, cutlass::layout::RowMajor, 8,
      cute::conditional_t<
          kPingpong, cutlass::epilogue::TmaWarpSpecialized,
          cutlass::epilogue::TmaWarpSpecializedCooperative>,
      Fusion>::CollectiveOp;

  static constexpr auto kMajor = cute::GMMA::Major::K;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float, FlatTile, kMajor, kMajor>(),
      cute::Layout<Shape<Int<kPingpong ? 1 : 2>, _1, _1>>{}));
  static constexpr int kStages =
      cutlass::conv::collective::detail::compute_stage_count_or_override<
          cutlass::gemm::collective::detail::sm90_smem_capacity_bytes, Element, Element, FlatTile>(
          cutlass::conv::collective::StageCountAutoCarveout<
              static_cast<int>(sizeof(typename Epilogue::SharedStorage))>{});
  template <class Rows>
  using SharedLayout = decltype(cute::tile_to_shape(
      cutlass::gemm::collective::detail::ss_smem_selector<
          kMajor, Element, Rows, Int<kChannelsPerStep>>(),
      Shape<Rows, Shape<Int<kChannelsPerStep>>, Int<kStages>>{}, cute::Step<_2, _1, _3>{}));
  using LoadB = cute::conditional_t<
      kShape.cluster == 1, cute::SM90_TMA_LOAD, cute::SM90_TMA_LOAD_MULTICAST>;
  using Mainloop = Im2colMainloop<cutlass::conv::collective::CollectiveConv<
      cutlass::conv::MainloopSm90TmaGmmaWarpSpecializedImplicitGemm<
          cutlass::conv::Operator::kFprop, kStages, 2, Cluster,
          cute::conditional_t<
              kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
              cutlass::gemm::KernelTmaWarpSpecializedCooperative>>,
      Tile, Element, Element, Mma,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<
          cute::SM90_TMA_LOAD_IM2COL, SharedLayout<M>>,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<LoadB, SharedLayout<N>>>>;

  using GemmShape = Shape<int, int, Shape<int, int, int>, int>;
  using Gemm = cutlass::gemm::kernel::GemmUniversal<
      GemmShape, Mainloop, Epilogue,
      cute::conditional_t<
          kShape.schedule == Schedule::kStreamK, cutlass::gemm::StreamKScheduler,
          cutlass::gemm::PersistentScheduler>>;
};

template <class Gemm>
typename Gemm::Arguments gemm_arguments(const Call& call) {
  using Element = typename Gemm::ElementA;
  const Problem& p = call.problem;
  typename Gemm::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {
      static_cast<int>(p.pixels()), p.filters, {p.channels, p.kernel_w, p.kernel_h}, 1};
  arguments.mainloop.convolution = {
      cutlass::conv::Mode::kCrossCorrelation,
      {p.batch, p.height, p.width, p.channels},
      {p.filters, p.kernel_h, p.kernel_w, p.channels},
      {p.padding_h, p.padding_w}, // before
      {p.padding_h, p.padding_w}, // and after
      {p.stride_h, p.stride_w},
      {1, 1}, // dilation
      1};     // groups
  arguments.mainloop.pointers = {
      static_cast<const Element*>(call.x), static_cast<const Element*>(call.weight)};
  auto& epilogue = arguments.epilogue;
  // A tensor map needs an address even for a residual that is never loaded.
  epilogue.ptr_C = static_cast<const Element*>(call.residual ? call.residual : call.out);
  epilogue.ptr_D = static_cast<Element*>(call.out);
  cute::get<0>(epilogue.dC) = p.filters;
  cute::get<0>(epilogue.dD) = p.filters;
  epilogue.thread.beta = call.residual ? 1.0f : 0.0f;
  epilogue.thread.bias_ptr = call.bias;
  epilogue.thread.activation = {call.activation, call.negative_slope};
  arguments.hw_info.sm_count = call.multiprocessors;
  return arguments;
}

template <class Gemm>
cudaError_t launch_gemm(const Call& call) {
  const typename Gemm::Arguments arguments = gemm_arguments<Gemm>(call);
  if (!Gemm::can_implement(arguments))
    throw std::runtime_error("CUTLASS refuses a convolution that hopper_plan.h allows");
  const size_t bytes = Gemm::get_workspace_size(arguments);
  void* workspace = bytes > 0 ? call.workspace(bytes) : nullptr;
  if (Gemm::initialize_workspace(arguments, workspace, call.stream) != cutlass::Status::kSuccess)
    return cudaErrorUnknown;
  typename Gemm::Params params = Gemm::to_underlying_arguments(arguments, workspace);

  constexpr auto kernel = cutlass::device_kernel<Gemm>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Gemm::SharedStorageSize);
  if (error != cudaSuccess) return error;
  using Cluster = typename Gemm::ClusterShape;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim = {cute::size<0>(Cluster{}), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = Gemm::get_grid_shape(params);
  config.blockDim = Gemm::get_block_shape();
  config.dynamicSmemBytes = Gemm::SharedStorageSize;
  config.stream = call.stream;
  config.attrs = &together;
  config.numAttrs = cute::size(Cluster{}) > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <class Element, bool kPingpong>
cudaError_t launch(const Call& call, int config) {
#define RESFAST_LAUNCH(index, m, n, cluster, schedule)                \
  if constexpr ((schedule == Schedule::kPingpong) == kPingpong)       \
    if (config == index) return launch_gemm<typename Kernel<Element, index>::Gemm>(call);
  RESFAST_HOPPER_CONFIGS(RESFAST_LAUNCH)
#undef RESFAST_LAUNCH
  return cudaErrorInvalidValue;
}

} // namespace resfast::hopper
