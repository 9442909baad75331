// The GPU primitives that the kernels use, as inline PTX for sm_80 and newer. Kernels use no other
// feature of a GPU, so that a build with RESFAST_ON_HOST can run them block by block on a CPU. Such
// a build provides its own <cuda_on_host/device.h>; that of the tests is in tests/.
//
// The layouts of fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16" and
// "... mma.m16n8k8", and of `ldmatrix`.
#pragma once

#ifdef RESFAST_ON_HOST
#include <cuda_on_host/device.h>
#else

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define RESFAST_DEVICE __device__ __forceinline__
#define RESFAST_UNROLL _Pragma("unroll")

namespace resfast::device {

RESFAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
RESFAST_DEVICE unsigned block_x() { return blockIdx.x; }
RESFAST_DEVICE unsigned block_y() { return blockIdx.y; }
RESFAST_DEVICE void sync_threads() { __syncthreads(); }
RESFAST_DEVICE void sync_warp() { __syncwarp(); }

// The dynamic shared memory of the block.
RESFAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// An address in shared memory, for asynchronous copies and ldmatrix.
using Shared = uint32_t;
RESFAST_DEVICE Shared shared_address(const char* memory) {
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

// 16 bytes of global memory to shared memory, or zeros where not `valid`; both aligned.
RESFAST_DEVICE void copy_async(Shared to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

RESFAST_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most `kPending` of the groups that this thread committed are under way.
template <int kPending>
RESFAST_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

RESFAST_DEVICE void store_shared(Shared to, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}

// Four 8x8 matrices of 16-bit values (or 8x4 of 32-bit ones); lane 8 i + j gives row j of the i-th.
RESFAST_DEVICE void load_matrices(uint32_t (&matrix)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(row)
               : "memory");
}

RESFAST_DEVICE void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RESFAST_DEVICE void mma_fp16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RESFAST_DEVICE void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RESFAST_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

RESFAST_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
RESFAST_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
RESFAST_DEVICE float bf16_to_float(uint16_t bits) { return float_of(uint32_t{bits} << 16); }
RESFAST_DEVICE uint16_t float_to_bf16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
RESFAST_DEVICE float fp16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
RESFAST_DEVICE uint16_t float_to_fp16(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

RESFAST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

} // namespace resfast::device

#endif
