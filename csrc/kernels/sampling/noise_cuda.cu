#include "common/cuda_utils.cuh"
#include "kernels/sampling/noise.h"

namespace stretto {
namespace {

constexpr int kBlock = 256;

__global__ void __launch_bounds__(kBlock) uniform_kernel(const NoiseParams p) {
  const int64_t row = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (row < p.rows) p.out[row] = uniform53(noise_block(p.seed[row], p.lineage[row], p.pos[row], p.purpose, p.index));
}

// Four tokens share a Philox block, and a thread.
__global__ void __launch_bounds__(kBlock) gumbel_kernel(const NoiseParams p, const int64_t blocks_a_row) {
  const int64_t row = blockIdx.x / blocks_a_row, first = (blockIdx.x % blocks_a_row * kBlock + threadIdx.x) * 4;
  if (first >= p.width) return;
  const PhiloxBlock noise = noise_block(p.seed[row], p.lineage[row], p.pos[row], p.purpose, static_cast<uint32_t>(first / 4));
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (first + k < p.width) p.out[row * p.width + first + k] = -log(-log(uniform_open(noise.word[k])));
}

}  // namespace

void noise_cuda(const NoiseParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  if (p.width == 0) return launch_kernel<uniform_kernel>({.grid = unsigned(ceil_div<int64_t>(p.rows, kBlock)), .block = kBlock, .stream = stream}, p);
  const int64_t blocks_a_row = ceil_div<int64_t>(p.width, 4 * kBlock);
  launch_kernel<gumbel_kernel>({.grid = unsigned(p.rows * blocks_a_row), .block = kBlock, .stream = stream}, p, blocks_a_row);
}

STRETTO_CUDA_KERNEL(noise, NoiseParams)

}  // namespace stretto
