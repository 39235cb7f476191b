// Draft trees on a block of threads.
#pragma once
#include "common/cuda_utils.cuh"

namespace stretto {

// valid_tree of kernels/tree/tree.h by a whole block; every thread gets the answer, and it is a barrier.
__device__ inline bool valid_tree_block(const int32_t* parent, int64_t n, int64_t slots) {
  bool ok = n >= 0 && n <= slots;
  if (ok)
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) ok &= i == 0 ? parent[0] == -1 : parent[i] >= 0 && parent[i] < i;
  return __syncthreads_and(ok);
}

}  // namespace stretto
