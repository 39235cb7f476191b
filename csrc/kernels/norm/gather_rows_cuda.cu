#include "common/cuda_utils.cuh"
#include "kernels/norm/gather_rows.h"

namespace stretto {
namespace {

constexpr int kBlock = 256;

__global__ void __launch_bounds__(kBlock) gather_rows_kernel(const GatherRowsParams p, const bool whole_packs) {
  const int64_t i = blockIdx.x;
  if (i >= rows_in_use(p.num_rows, p.count)) return;
  const int64_t row = p.rows[i];
  const bool in_range = row >= 0 && row < p.num_x;
  const float* x = p.x + (in_range ? row * p.x_stride : 0);
  for (int64_t at = int64_t(threadIdx.x) * kPack<float>; at < p.width; at += kBlock * kPack<float>)
    store_pack(p.out + i * p.out_stride, at, p.width, whole_packs, in_range ? load_pack(x, at, p.width, whole_packs) : Pack<float, kPack<float>>{});
}

}  // namespace

void gather_rows_cuda(const GatherRowsParams& p, cudaStream_t stream) {
  if (p.count == 0 || p.width == 0) return;
  const bool whole_packs = aligned16(p.x) && aligned16(p.out) && p.width % 4 == 0 && p.x_stride % 4 == 0 && p.out_stride % 4 == 0;
  launch_kernel<gather_rows_kernel>({.grid = unsigned(p.count), .block = kBlock, .stream = stream}, p, whole_packs);
}

STRETTO_CUDA_KERNEL(gather_rows, GatherRowsParams)

}  // namespace stretto
