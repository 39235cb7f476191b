// Inverse of a running sum over non-negative weights, by a block. Sums in double, in a fixed order.
#pragma once
#include "common/cuda_utils.cuh"

namespace stretto {

// Each warp owns one run of consecutive weights, so that a running sum needs no order but that of the runs.
template <int kThreads> struct RunSums {
  static constexpr int kWarps = kThreads / kWarp;
  double sum[kWarps];
  int64_t found;   // -1: no run passed the target
  long long last;  // of the positive weights
};

template <int kThreads> __device__ __forceinline__ int64_t run_length(int64_t n) {
  return ceil_div<int64_t>(ceil_div<int64_t>(n, RunSums<kThreads>::kWarps), kWarp) * kWarp;
}

// Sum of weight(i), i in [0, n), and the sums of the warps' runs in shared memory; -1 where a weight is negative, NaN or infinite.
template <int kThreads, class F> __device__ __forceinline__ double run_sums(int64_t n, const F& weight, RunSums<kThreads>& s) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t run = run_length<kThreads>(n), begin = warp * run, end = begin + run < n ? begin + run : n;
  double sum = 0;
  bool bad = false;
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    const double x = weight(i);
    sum += x;
    bad |= !(x >= 0) || !(x - x == 0);
  }
  sum = warp_sum(sum);
  __syncthreads();  // earlier sums have been read
  if (lane == 0) s.sum[warp] = sum;
  if (threadIdx.x == 0) s.found = s.last = -1;
  if (__syncthreads_or(bad)) return -1;
  double total = 0;
  for (int w = 0; w < RunSums<kThreads>::kWarps; ++w) total += s.sum[w];
  return total;
}

// After run_sums gave total > 0: the first index whose running sum exceeds u * total, u in [0, 1); an index of positive weight always.
template <int kThreads, class F> __device__ __forceinline__ int32_t inverse_cdf(int64_t n, double total, double u, const F& weight,
                                                                                RunSums<kThreads>& s) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t run = run_length<kThreads>(n), begin = warp * run, end = begin + run < n ? begin + run : n;
  const double target = u * total;
  double before = 0;
  for (int w = 0; w < warp; ++w) before += s.sum[w];
  if (begin < n && before <= target && before + s.sum[warp] > target) {  // the run in which the target is passed
    int64_t found = -1;
    for (int64_t first = begin; first < end; first += kWarp) {
      const int64_t i = first + lane;
      const double x = i < end ? weight(i) : 0;
      double sum = x;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const double lower = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += lower;
      }
      const unsigned some = __ballot_sync(kAllLanes, x > 0), over = __ballot_sync(kAllLanes, x > 0 && before + sum > target);
      if (some) found = first + 31 - __clz(static_cast<int>(some));  // should rounding hide the end of the run: its last weight
      if (over) {
        found = first + __ffs(static_cast<int>(over)) - 1;
        break;
      }
      before += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (lane == 0) s.found = found;
  }
  __syncthreads();
  if (s.found >= 0) return static_cast<int32_t>(s.found);
  // Rounding hid the end of the row: the last weight of all.
  long long last = -1;
  for (int64_t i = begin + lane; i < end; i += kWarp)
    if (weight(i) > 0) last = i;
  if (last >= 0) atomicMax(&s.last, last);
  __syncthreads();
  return static_cast<int32_t>(s.last);
}

}  // namespace stretto
