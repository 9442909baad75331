// One launch of the convolution for Hopper, between the operator (hopper.cu) and its kernels
// (hopper_TYPE_SCHEDULE.cu), which alone know of CUTLASS.
#pragma once

#include <cstddef>
#include <functional>

#include <cuda_runtime.h>

#include "hopper_plan.h"

namespace resfast::hopper {

// Every pointer is aligned to 16 bytes but that of the bias; see conv_plan.h for what is computed.
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
  std::function<void*(size_t bytes)> workspace; // memory on the device until the launch has ended
};

// The launches, each for the configurations of one schedule (kCooperative: and kStreamK) on the
// current device. They throw std::runtime_error where a tensor map is refused.
cudaError_t launch_bf16_pingpong(const Call& call, int config);
cudaError_t launch_bf16_cooperative(const Call& call, int config);
cudaError_t launch_fp16_pingpong(const Call& call, int config);
cudaError_t launch_fp16_cooperative(const Call& call, int config);

} // namespace resfast::hopper
