#include "hopper.cuh"

namespace resfast::hopper {

cudaError_t launch_fp16_cooperative(const Call& call, int config) {
  return launch<cutlass::half_t, false>(call, config);
}

} // namespace resfast::hopper
