// Interface between the Hopper convolution's operator (hopper.cu) and its kernels
// (hopper_TYPE_SCHEDULE.cu), the only files that include CUTLASS.
#pragma once

#include <cstddef>
#include <functional>

#include <cuda_runtime.h>

#include "hopper_plan.h"

namespace resfast::hopper {

// All pointers except the bias are aligned to 16 bytes; conv_plan.h defines the result.
struct Call {
  Problem problem;      // without an obstacle
  const void* x;        // [N, H, W, C]
  const void* weight;   // [K, R, S, C]
  const float* bias;    // [K] or null
  const void* residual; // [N, P, Q, K] or null
  void* out;            // [N, P, Q, K]
  conv::Activation activation;
  float negative_slope;
  int multiprocessors;
  cudaStream_t stream;
  std::function<void*(size_t bytes)> workspace; // device memory, valid until the launch has ended
};

// The launches on the current device, each for the configurations of one schedule (kCooperative
// also for kStreamK). They throw std::runtime_error if a tensor map is refused.
cudaError_t launch_bf16_pingpong(const Call& call, int config);
cudaError_t launch_bf16_cooperative(const Call& call, int config);
cudaError_t launch_fp16_pingpong(const Call& call, int config);
cudaError_t launch_fp16_cooperative(const Call& call, int config);

} // namespace resfast::hopper
