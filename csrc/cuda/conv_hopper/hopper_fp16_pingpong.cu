#include "hopper.cuh"

namespace resfast::hopper {

cudaError_t launch_fp16_pingpong(const Call& call, int config) {
  return launch<cutlass::half_t, true>(call, config);
}

} // namespace resfast::hopper
