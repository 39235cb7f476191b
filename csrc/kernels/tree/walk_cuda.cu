#include "kernels/tree/walk.h"

#include "kernels/tree/tree.cuh"

namespace stretto {
namespace {

// A warp a sequence. Children come after their parent, so the nodes are passed once, 32 at a time.
__global__ void __launch_bounds__(kWarp) walk_kernel(const WalkParams p) {
  const int64_t b = blockIdx.x, at = b * p.nodes;
  const int32_t *next = p.next + at, *tokens = p.tokens + at, *parent = p.parent + at;
  int32_t* path = p.path + at;
  const int32_t n = p.n[b];
  const bool valid = valid_tree_block(parent, n, p.nodes);
  for (int64_t i = threadIdx.x; i < p.nodes; i += kWarp) path[i] = -1;
  __syncwarp();  // path[...] is written by another lane below
  if (!valid || n == 0) {
    if (threadIdx.x == 0) p.accepted[b] = valid ? 0 : -1, p.bonus[b] = -1;
    return;
  }
  int32_t node = 0, length = 0, wanted = next[0];
  if (threadIdx.x == 0) path[0] = 0;
  for (int32_t first = 1; first < n; first += kWarp) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x);
    const int32_t above = i < n ? parent[i] : -1, token = i < n ? tokens[i] : -1;
    unsigned left = kAllLanes;  // lanes behind the last node taken
    for (;;) {
      const unsigned found = __ballot_sync(kAllLanes, above == node && token >= 0 && token == wanted) & left;
      if (found == 0) break;
      const int lane = __ffs(static_cast<int>(found)) - 1;
      node = first + lane;
      wanted = next[node];
      ++length;
      if (threadIdx.x == 0) path[length] = node;
      left = lane == 31 ? 0 : kAllLanes << (lane + 1);
    }
  }
  if (threadIdx.x == 0) p.accepted[b] = length, p.bonus[b] = wanted >= 0 ? wanted : -1;
}

}  // namespace

void walk_cuda(const WalkParams& p, cudaStream_t stream) {
  if (p.batch == 0 || p.nodes == 0) return;
  launch_kernel<walk_kernel>({.grid = unsigned(p.batch), .block = kWarp, .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(walk, WalkParams)

}  // namespace stretto
