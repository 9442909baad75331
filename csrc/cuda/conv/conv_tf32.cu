#include "conv_kernels.cuh"

namespace resfast::conv {

cudaError_t launch_tf32(
    const Params& params, int tile, bool aligned, int device, cudaStream_t stream) {
  return launch_type<Tf32>(params, tile, aligned, device, stream);
}

} // namespace resfast::conv
