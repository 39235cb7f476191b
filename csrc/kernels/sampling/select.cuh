// Where to cut a set of items ordered by (value falling, index rising), without sorting it: a radix search from the highest digit down. Weights
// are integers, so their sums are the same in any order and the cut is deterministic.
#pragma once
#include "common/cuda_utils.cuh"

namespace stretto {

using Weight = unsigned long long;

// Rises with x; both zeros have one key. NaN has no place in the order.
__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct CutShared {
  Weight bins[256];
  Weight before;  // weight above the digit found
  uint32_t digit;
  int equals[kWarp];  // per warp, of the chunk that is scanned
};

struct DeviceCut {
  uint32_t key;
  int64_t index;
  // Kept: a larger key, or this key and an index not above this one.
  __device__ __forceinline__ bool keeps(uint32_t k, int64_t i) const { return k > key || (k == key && i <= index); }
};

// The highest bin at which the running weight, begun with `before`, reaches `target`; the lowest with weight where none does. By one warp: lane 0
// holds the eight highest bins.
__device__ inline void find_digit(CutShared& s, Weight before, Weight target) {
  const int lane = threadIdx.x;
  Weight local = 0;
  for (int i = 0; i < 8; ++i) local += s.bins[255 - 8 * lane - i];
  Weight sum = local;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Weight lower = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += lower;
  }
  const unsigned reach = __ballot_sync(kAllLanes, local > 0 && before + sum >= target), weighty = __ballot_sync(kAllLanes, local > 0);
  const int chosen = reach ? __ffs(static_cast<int>(reach)) - 1 : weighty ? 31 - __clz(static_cast<int>(weighty)) : 0;
  if (lane != chosen) return;
  Weight above = before + sum - local;
  int digit = 255 - 8 * lane, found = digit;
  Weight above_found = above;
  for (int i = 0; i < 8; ++i, --digit) {
    if (s.bins[digit] == 0) continue;
    found = digit, above_found = above;
    above += s.bins[digit];
    if (above >= target) break;
  }
  s.digit = static_cast<uint32_t>(found);
  s.before = above_found;
}

// The item at which the running weight first reaches `target` (at least 1); the last one where it never does. item(i, key) gives the weight of
// item i, 0 for one that takes no part, and its key; equal keys have equal weights. Called by kThreads threads together.
template <int kThreads, class Item> __device__ DeviceCut find_cut(int64_t count, Weight target, const Item& item, CutShared& s) {
  uint32_t prefix = 0;
  Weight above = 0, equal_weight = 0;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      uint32_t key = 0;
      const Weight weight = item(i, key);
      if (weight && (shift == 24 || key >> (shift + 8) == prefix)) atomicAdd(&s.bins[key >> shift & 255], weight);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(s, above, target);
    __syncthreads();
    prefix = prefix << 8 | s.digit;
    above = s.before;
    equal_weight = s.bins[s.digit];
    __syncthreads();  // both are written again
  }
  if (above + equal_weight <= target) return {prefix, int64_t(1) << 62};  // all with this key
  // Among equals the lower indices stay: the one whose turn reaches the target is looked for in order.
  int64_t passed = 0;
  for (int64_t first = 0;; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    uint32_t key = 0;
    const Weight weight = i < count ? item(i, key) : 0;
    const bool equal = weight != 0 && key == prefix;
    const unsigned votes = __ballot_sync(kAllLanes, equal);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0) s.equals[warp] = __popc(votes);
    if (threadIdx.x == 0) s.digit = kThreads;
    __syncthreads();
    int64_t turn = passed + __popc(votes & ((2u << lane) - 1)), all = passed;  // 2u << 31 is 0, and 0 - 1 all lanes
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) turn += s.equals[w];
      all += s.equals[w];
    }
    const Weight reached = above + static_cast<Weight>(turn) * weight;
    if (equal && reached >= target && reached - weight < target) s.digit = threadIdx.x;
    __syncthreads();
    const uint32_t found = s.digit;
    __syncthreads();
    if (found != kThreads) return {prefix, first + found};
    passed = all;
  }
}

}  // namespace stretto
