#include "kernels/sampling/penalize.h"

#include "common/cuda_utils.cuh"

namespace stretto {
namespace {

constexpr int kBlock = 512;

// A block a row. The thread of a token's first appearance counts the others and changes its logit; a table by token would need memory for the
// vocabulary. Biases may name a token twice: the thread of the first entry adds them in their order.
__global__ void __launch_bounds__(kBlock) penalize_kernel(const PenalizeParams p) {
  const int64_t row = blockIdx.x;
  if (row >= rows_in_use(p.num_rows, p.rows)) return;
  float* logits = p.logits + row * p.stride;
  const float repetition = p.repetition[row], presence = p.presence[row], frequency = p.frequency[row];
  const auto first_at = [](const int32_t* ids, int64_t begin, int64_t i) {
    for (int64_t j = begin; j < i; ++j)
      if (ids[j] == ids[i]) return false;
    return true;
  };
  if (repetition != 1 || presence != 0 || frequency != 0) {
    int64_t begin = row * p.history_width, end = begin + p.history_width;
    if (p.cu_history) begin = max(int64_t(p.cu_history[row]), int64_t(0)), end = min(int64_t(p.cu_history[row + 1]), p.total_history);
    for (int64_t i = begin + threadIdx.x; i < end; i += kBlock) {
      const int32_t id = p.history[i];
      if (id < 0 || id >= p.width || !first_at(p.history, begin, i)) continue;
      int count = 1;
      for (int64_t j = i + 1; j < end; ++j) count += p.history[j] == id;
      const float l = logits[id] > 0 ? logits[id] / repetition : logits[id] * repetition;
      logits[id] = l - (presence + frequency * static_cast<float>(count));
    }
  }
  if (!p.bias_ids) return;
  __syncthreads();
  const int64_t begin = max(int64_t(p.cu_bias[row]), int64_t(0)), end = min(int64_t(p.cu_bias[row + 1]), p.total_bias);
  for (int64_t i = begin + threadIdx.x; i < end; i += kBlock) {
    const int32_t id = p.bias_ids[i];
    if (id < 0 || id >= p.width || !first_at(p.bias_ids, begin, i)) continue;
    for (int64_t j = i; j < end; ++j)
      if (p.bias_ids[j] == id) logits[id] += p.bias_values[j];
  }
}

}  // namespace

void penalize_cuda(const PenalizeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  launch_kernel<penalize_kernel>({.grid = unsigned(p.rows), .block = kBlock, .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(penalize, PenalizeParams)

}  // namespace stretto
