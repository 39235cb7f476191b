#include "kernels/sampling/row_scan.cuh"

namespace stretto {
namespace {

// A block a row. One row of 131,072 keeps one multiprocessor busy for some 8 us; from 64 rows on the memory is the limit.
constexpr int kBlock = 1024;

__global__ void __launch_bounds__(kBlock) argmax_kernel(const ArgmaxParams p) {
  const int64_t row = blockIdx.x;
  if (row >= rows_in_use(p.num_rows, p.rows)) return;
  const RowScan scan = scan_row<kBlock>(p.logits + row * p.stride, p.width, *shared_memory<RowScanShared<kBlock>>());
  if (threadIdx.x != 0) return;
  p.out[row] = scan.argmax;
  if (p.status) p.status[row] = scan.status;
}

}  // namespace

void argmax_cuda(const ArgmaxParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch_kernel<argmax_kernel>({.grid = unsigned(p.rows), .block = kBlock, .smem_bytes = sizeof(RowScanShared<kBlock>), .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(argmax, ArgmaxParams)

}  // namespace stretto
