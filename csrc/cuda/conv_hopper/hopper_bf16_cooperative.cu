#include "hopper.cuh"

namespace resfast::hopper {

cudaError_t launch_bf16_cooperative(const Call& call, int config) {
  return launch<cutlass::bfloat16_t, false>(call, config);
}

} // namespace resfast::hopper
