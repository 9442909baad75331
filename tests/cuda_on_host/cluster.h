// The primitives of csrc/cuda/common/cluster.h on the host: the blocks of a cluster are `Block`s of
// device.h that run alternately. Each runs to the next barrier of the cluster while the others
// wait, so that a read from another block without a barrier finds data that is not written yet.
#pragma once

#include "device.h"

namespace resfast::device {

struct Cluster {
  std::vector<Block> blocks;
  std::vector<std::vector<bool>> at_barrier; // of the cluster, by block and thread
  int current = 0;                           // block
  bool started = false;                      // every thread has been at a barrier of the cluster
};
extern Cluster* cluster;

inline int cluster_size() { return static_cast<int>(cluster->blocks.size()); }
inline int cluster_rank() { return cluster->current; }

inline void sync_cluster() {
  cluster->at_barrier[static_cast<size_t>(cluster->current)]
                     [static_cast<size_t>(block->current)] = true;
  sync_threads();
}

inline void store_cluster(Shared to, int rank, uint4 value) {
  require_shared(to, 16);
  require(rank >= 0 && rank < cluster_size(), "no such block in the cluster");
  Block& other = cluster->blocks[static_cast<size_t>(rank)];
  require(cluster->started, "a write to a block that may not run yet");
  for (const Thread& thread : other.threads)
    require(thread.state != State::kDone, "a write to a block that may have ended");
  std::memcpy(other.shared + (to - block->shared), &value, 16);
}

// Runs `body` as every thread of the blocks (first, y) to (first + size - 1, y). `order` picks
// which block, which warp and which lane goes first between two barriers.
void run_cluster(
    unsigned first, unsigned y, int size, int threads, size_t shared_bytes, unsigned order,
    const std::function<void()>& body);

} // namespace resfast::device
