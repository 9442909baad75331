// Thread block clusters (sm_90 and newer): blocks that run at the same time and write to each
// other's shared memory. Before sm_90 every block is its own cluster. A build with RESFAST_ON_HOST
// provides its own <cuda_on_host/cluster.h>, as for device.h.
//
// Source: the PTX ISA, "barrier.cluster", "mapa" and "st.shared::cluster".
#pragma once

#ifdef RESFAST_ON_HOST
#include <cuda_on_host/cluster.h>
#else

#include "device.h"

namespace resfast::device {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

RESFAST_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return static_cast<int>(size);
}

RESFAST_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return static_cast<int>(rank);
}

// Barrier of all threads of the cluster; their writes to shared memory are visible after it.
RESFAST_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// Stores 16 bytes at the same address in the shared memory of another block of the cluster.
RESFAST_DEVICE void store_cluster(Shared to, int rank, uint4 value) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(to), "r"(rank));
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(there), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

#else

RESFAST_DEVICE int cluster_size() { return 1; }
RESFAST_DEVICE int cluster_rank() { return 0; }
RESFAST_DEVICE void sync_cluster() { sync_threads(); }
RESFAST_DEVICE void store_cluster(Shared to, int, uint4 value) { store_shared(to, value); }

#endif

} // namespace resfast::device

#endif
