#include "kernels/sampling/warp.h"

#include "kernels/sampling/row_scan.cuh"
#include "kernels/sampling/select.cuh"

namespace stretto {
namespace {

// A block a row; the row is read again for each digit of a cut (four for top_k, four for top_p), from the L2.
constexpr int kBlock = 1024;
// Masses are summed as integers, so that their order does not matter: a weight of 1 is 2^kMassBits. With 2^30 tokens the sum stays below 2^64, and
// a rounding is 2^-34 of the largest weight.
constexpr int kMassBits = 33;

struct Shared {
  RowScanShared<kBlock> scan;
  CutShared cut;
  double sums[kBlock / kWarp];
  Weight total;
};

__device__ __forceinline__ bool legal(float t, int64_t top_k, float top_p, float min_p) {
  return t >= 0 && t < __int_as_float(0x7f800000) && top_k >= 0 && top_p >= 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
}

__global__ void __launch_bounds__(kBlock) warp_kernel(const WarpParams p) {
  const int64_t row = blockIdx.x, width = p.width;
  if (row >= rows_in_use(p.num_rows, p.rows)) return;
  Shared& s = *shared_memory<Shared>();
  const float* logits = p.logits + row * p.logits_stride;
  float* out = p.out + row * p.out_stride;
  const float temperature = p.temperature[row], top_p = p.top_p[row], min_p = p.min_p[row];
  const int64_t top_k = p.top_k[row];
  RowScan scan{0, -1, kRowBadArgument};
  if (legal(temperature, top_k, top_p, min_p)) scan = scan_row<kBlock>(logits, width, s.scan);
  if (threadIdx.x == 0 && p.status) p.status[row] = scan.status;
  if (scan.status >= kRowBroken || temperature == 0) {
    for (int64_t i = threadIdx.x; i < width; i += kBlock)
      out[i] = scan.status >= kRowBroken ? __int_as_float(0x7fc00000) : i == scan.argmax ? 1.f : 0.f;
    return;
  }
  const auto weight = [&](int64_t i) { return expf((logits[i] - scan.max) / temperature); };
  const DeviceCut everything{0, int64_t(1) << 62};
  DeviceCut by_k = everything, by_p = everything;
  if (top_k > 0 && top_k < width)
    by_k =
        find_cut<kBlock>(width, static_cast<Weight>(top_k), [&](int64_t i, uint32_t& key) { return key = ordered_key(logits[i]), Weight(1); }, s.cut);
  if (top_p < 1) {
    const auto mass = [&](int64_t i, uint32_t& key) -> Weight {
      key = ordered_key(logits[i]);
      return by_k.keeps(key, i) ? static_cast<Weight>(static_cast<double>(weight(i)) * double(Weight(1) << kMassBits) + 0.5) : 0;
    };
    if (threadIdx.x == 0) s.total = 0;
    __syncthreads();
    Weight own = 0;
    for (int64_t i = threadIdx.x; i < width; i += kBlock) {
      uint32_t key;
      own += mass(i, key);
    }
    own = warp_sum(own);
    if (threadIdx.x % kWarp == 0) atomicAdd(&s.total, own);
    __syncthreads();
    const double target = ceil(double(top_p) * static_cast<double>(s.total));
    by_p = find_cut<kBlock>(width, target < 1 ? Weight(1) : static_cast<Weight>(target), mass, s.cut);
  }
  const auto kept = [&](int64_t i, float w) {
    const uint32_t key = ordered_key(logits[i]);
    return by_k.keeps(key, i) && by_p.keeps(key, i) && w >= min_p;
  };
  double sum = 0;
  for (int64_t i = threadIdx.x; i < width; i += kBlock) {
    const float w = weight(i);
    if (kept(i, w)) sum += static_cast<double>(w);
  }
  sum = block_sum<kBlock>(sum, s.sums);
  for (int64_t i = threadIdx.x; i < width; i += kBlock) {
    const float w = weight(i);
    out[i] = kept(i, w) ? static_cast<float>(static_cast<double>(w) / sum) : 0.f;
  }
}

}  // namespace

void warp_cuda(const WarpParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch_kernel<warp_kernel>({.grid = unsigned(p.rows), .block = kBlock, .smem_bytes = sizeof(Shared), .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(warp, WarpParams)

}  // namespace stretto
