// Launches of the kernels for one value type. Each conv_TYPE.cu instantiates it, so that the types
// compile in parallel.
#pragma once

#include <atomic>

#include <cuda_runtime.h>

#include "conv.cuh"

namespace resfast::conv {

template <class Type, class Tile, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads, kAligned ? 0 : 1)
    convolve_kernel(const __grid_constant__ Params params) {
  convolve<Type, Tile, kAligned>(params);
}

template <class Type>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ Params params) {
  reduce<Type>(params);
}

template <class Type, int kTile, bool kAligned>
cudaError_t launch_tile(const Params& params, int device, cudaStream_t stream) {
  using Tile = typename TileAt<kTile>::Type;
  constexpr auto kernel = convolve_kernel<Type, Tile, kAligned>;
  static std::atomic<uint64_t> prepared{0}; // one bit per device
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (device > 63 || !(prepared.load(std::memory_order_relaxed) & bit)) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    if (error != cudaSuccess) return error;
    prepared.fetch_or(bit, std::memory_order_relaxed);
  }
  const unsigned tiles = static_cast<unsigned>(
      ceil_div(params.pixels, Tile::kM) * params.filter_tiles.divisor);
  kernel<<<dim3(tiles, params.splits), Tile::kThreads, Tile::kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

template <class Type>
cudaError_t launch_type(
    const Params& params, int tile, bool aligned, int device, cudaStream_t stream) {
  constexpr int kBytes = sizeof(typename Type::Value);
  cudaError_t error = tile == kEpilogueOnly ? cudaSuccess : cudaErrorInvalidValue;
#define RESFAST_LAUNCH(index, unused)                                                        \
  if constexpr (has_tile(index, kBytes, true))                                               \
    if (tile == index && aligned) error = launch_tile<Type, index, true>(params, device, stream); \
  if constexpr (has_tile(index, kBytes, false))                                              \
    if (tile == index && !aligned) error = launch_tile<Type, index, false>(params, device, stream);
  RESFAST_CONV_TILES(RESFAST_LAUNCH)
#undef RESFAST_LAUNCH
  if (error != cudaSuccess || params.splits == 1) return error;
  const int64_t items = int64_t{params.pixels} * (params.partial_pitch * kBytes / 16);
  const unsigned blocks = static_cast<unsigned>(ceil_div(items, kReduceThreads));
  reduce_kernel<Type><<<blocks, kReduceThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

// The launches, defined in conv_TYPE.cu, on the current device: a tile accepted by `has_tile`, or
// kEpilogueOnly without splits.
cudaError_t launch_bf16(const Params&, int tile, bool aligned, int device, cudaStream_t);
cudaError_t launch_fp16(const Params&, int tile, bool aligned, int device, cudaStream_t);
cudaError_t launch_fp32(const Params&, int tile, bool aligned, int device, cudaStream_t);
cudaError_t launch_tf32(const Params&, int tile, bool aligned, int device, cudaStream_t);

} // namespace resfast::conv
