// One pass over a row of logits by a block: the largest entry, where it is first found, and whether the row can be sampled from.
#pragma once
#include "common/cuda_utils.cuh"
#include "kernels/sampling/argmax.h"

namespace stretto {

struct RowScan {
  float max;
  int32_t argmax;  // -1 when status is kRowBroken
  int32_t status;
};

template <int kThreads> struct RowScanShared {
  float max[kThreads / kWarp];
  int32_t at[kThreads / kWarp];
};

// Every thread gets the result. `shared` is free again after the block's next barrier.
template <int kThreads> __device__ RowScan scan_row(const float* x, int64_t width, RowScanShared<kThreads>& shared) {
  const float infinity = __int_as_float(0x7f800000);
  const bool whole_packs = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  float best = -infinity;
  int32_t best_at = 0x7fffffff;
  bool broken = false, masked = false;
  for (int64_t at = int64_t(threadIdx.x) * 4; at < width; at += kThreads * 4) {
    const bool whole = whole_packs && at + 4 <= width;
    const Pack<float, 4> v = load_pack(x, at, width, whole);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (at + j >= width) break;
      if (v.v[j] > best) best = v.v[j], best_at = static_cast<int32_t>(at + j);  // ids rise: the first of equals stays
      broken |= !(v.v[j] < infinity);
      masked |= v.v[j] == -infinity;
    }
  }
  const auto take = [&](float other, int32_t other_at) {
    if (other > best || (other == best && other_at < best_at)) best = other, best_at = other_at;
  };
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, step);
    take(other, __shfl_xor_sync(kAllLanes, best_at, step));
  }
  if (threadIdx.x % kWarp == 0) shared.max[threadIdx.x / kWarp] = best, shared.at[threadIdx.x / kWarp] = best_at;
  broken = __syncthreads_or(broken);
  masked = __syncthreads_or(masked);
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) take(shared.max[w], shared.at[w]);
  if (broken || best == -infinity) return {best, -1, kRowBroken};
  return {best, best_at, masked ? kRowMasked : kRowFinite};
}

}  // namespace stretto
