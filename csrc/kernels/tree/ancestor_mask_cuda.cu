#include "kernels/tree/ancestor_mask.h"

#include "kernels/tree/tree.cuh"

namespace stretto {
namespace {

constexpr int kBlock = 128;

// A block a sequence, a thread a node: it walks up to the root and sets the bits it passes in its own row.
__global__ void __launch_bounds__(kBlock) ancestor_mask_kernel(const AncestorMaskParams p) {
  const int64_t b = blockIdx.x;
  const int32_t* parent = p.parent + b * p.nodes;
  uint64_t* mask = p.mask + b * p.nodes * p.words;
  const bool valid = valid_tree_block(parent, p.n[b], p.nodes);
  const int64_t n = valid ? p.n[b] : 0;
  for (int64_t i = threadIdx.x; i < p.nodes; i += kBlock) {
    for (int64_t w = 0; w < p.words; ++w) mask[i * p.words + w] = 0;
    int32_t depth = valid ? 0 : -1;
    if (i < n) {
      depth = -1;
      for (int64_t node = i; node >= 0; node = parent[node], ++depth) mask[i * p.words + node / 64] |= uint64_t(1) << node % 64;
    }
    p.depth[b * p.nodes + i] = depth;
  }
}

}  // namespace

void ancestor_mask_cuda(const AncestorMaskParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.nodes == 0) return;
  launch_kernel<ancestor_mask_kernel>({.grid = unsigned(p.batch), .block = kBlock, .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(ancestor_mask, AncestorMaskParams)

}  // namespace stretto
