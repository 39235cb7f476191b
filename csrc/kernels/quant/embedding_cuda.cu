#include "kernels/quant/embedding.h"

#include "kernels/quant/unpack.cuh"

namespace stretto {
namespace {

constexpr int kBlock = 256;

// A block a row. The row is one of sixteen that lie side by side: few bytes of each line are its own, and a step has few rows.
template <WeightFormat kFormat> __global__ void __launch_bounds__(kBlock) embedding_kernel(const EmbeddingParams p) {
  const int64_t r = blockIdx.x;
  if (r >= rows_in_use(p.num_rows, p.rows)) return;
  constexpr FormatInfo kInfo = kFormatInfo[static_cast<int>(kFormat)];
  const int64_t id = p.ids[r];
  float* out = p.out + r * p.out_stride;
  const bool in_range = id >= 0 && id < p.n;
  const uint8_t* group = p.packed + (in_range ? id / 16 * (p.k / kInfo.unit * kInfo.packed_bytes) : 0);
  for (int64_t i = threadIdx.x; i < p.k; i += kBlock) {
    float value = 0.f;
    if (in_range) value = unpack_value<kFormat>(group + i / kInfo.unit * kInfo.packed_bytes, int(id % 16), int(i % kInfo.unit));
    out[i] = p.scale == 1.f ? value : value * p.scale;
  }
}

}  // namespace

void embedding_cuda(const EmbeddingParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.k == 0) return;
  dispatch_format(p.format, [&](auto tag) {
    launch_kernel<embedding_kernel<decltype(tag)::value>>({.grid = unsigned(p.rows), .block = kBlock, .stream = stream}, p);
  });
}

STRETTO_CUDA_KERNEL(embedding, EmbeddingParams)

}  // namespace stretto
