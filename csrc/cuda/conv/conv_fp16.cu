#include "conv_kernels.cuh"

namespace resfast::conv {

cudaError_t launch_fp16(
    const Params& params, int tile, bool aligned, int device, cudaStream_t stream) {
  return launch_type<Fp16>(params, tile, aligned, device, stream);
}

} // namespace resfast::conv
