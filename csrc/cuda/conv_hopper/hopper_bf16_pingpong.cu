#include "hopper.cuh"

namespace resfast::hopper {

cudaError_t launch_bf16_pingpong(const Call& call, int config) {
  return launch<cutlass::bfloat16_t, true>(call, config);
}

} // namespace resfast::hopper
