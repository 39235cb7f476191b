#include "kernels/sampling/draw.h"

#include "kernels/sampling/inverse_cdf.cuh"

namespace stretto {
namespace {

constexpr int kBlock = 512;

struct Shared {
  RunSums<kBlock> sums;
  double time[kBlock / kWarp];
  int32_t at[kBlock / kWarp];
};

// The token whose exponential clock of rate p rings first: the order of log p + Gumbel noise. Ties to the lowest id.
__device__ int32_t draw_gumbel(const DrawParams& p, int64_t row, const float* w, Shared& s) {
  const double never = __longlong_as_double(0x7ff0000000000000LL);
  double best = never;
  int32_t best_at = 0x7fffffff;
  for (int64_t first = int64_t(threadIdx.x) * 4; first < p.width; first += kBlock * 4) {
    const PhiloxBlock noise = noise_block(p.seed[row], p.lineage[row], p.pos[row], p.purpose, static_cast<uint32_t>(first / 4));
    for (int k = 0; k < 4 && first + k < p.width; ++k) {
      const double weight = w[first + k], u = uniform_open(noise.word[k]);
      if (!(weight > 0) || !(1 - u < best * weight)) continue;  // -log u is at least 1 - u: most tokens need no logarithm
      const double time = -log(u) / weight;
      if (time < best) best = time, best_at = static_cast<int32_t>(first + k);
    }
  }
  const auto take = [&](double time, int32_t at) {
    if (time < best || (time == best && at < best_at)) best = time, best_at = at;
  };
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double time = __shfl_xor_sync(kAllLanes, best, step);
    take(time, __shfl_xor_sync(kAllLanes, best_at, step));
  }
  if (threadIdx.x % kWarp == 0) s.time[threadIdx.x / kWarp] = best, s.at[threadIdx.x / kWarp] = best_at;
  __syncthreads();
  for (int i = 0; i < kBlock / kWarp; ++i) take(s.time[i], s.at[i]);
  return best < never ? best_at : -1;
}

__global__ void __launch_bounds__(kBlock) draw_kernel(const DrawParams p) {
  const int64_t row = blockIdx.x;
  if (row >= rows_in_use(p.num_rows, p.rows)) return;
  Shared& s = *shared_memory<Shared>();
  const float* w = p.p + row * p.stride;
  const auto weight = [&](int64_t i) { return static_cast<double>(w[i]); };
  const double total = run_sums(p.width, weight, s.sums);
  int32_t token = -1;
  if (total > 0) {
    if (p.gumbel) token = draw_gumbel(p, row, w, s);
    else token = inverse_cdf(p.width, total, uniform53(noise_block(p.seed[row], p.lineage[row], p.pos[row], p.purpose, 0)), weight, s.sums);
  }
  if (threadIdx.x == 0) p.out[row] = token;
}

}  // namespace

void draw_cuda(const DrawParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch_kernel<draw_kernel>({.grid = unsigned(p.rows), .block = kBlock, .smem_bytes = sizeof(Shared), .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(draw, DrawParams)

}  // namespace stretto
