// One pass over a row of logits: the largest entry, where it is first found, and whether the row can be sampled from.
// For *_cpu.cpp only.
#pragma once
#include "common/simd.h"
#include "kernels/sampling/argmax.h"

namespace stretto::STRETTO_ISA {

inline constexpr int64_t kScanChunk = 256;  // elements; its 16 lane maxima are what warp keeps to bound the k-th largest entry

struct RowScan {
  float max;
  int32_t argmax;  // -1 when status is kRowBroken
  int32_t status;
};

// maxima: null, or [width / kScanChunk * 16]: for each whole chunk, the maximum of each lane's 16 elements.
static inline RowScan scan_row(const float* x, int64_t width, float* maxima) {
  const f32x16 lowest = broadcast(-3.402823466e38f), nothing = zero();
  f32x16 usable = zero(), finite = zero();  // 0 until a NaN or +inf (usable) or any non-finite value (finite) makes a lane NaN
  float best = -__builtin_inff();
  int64_t best_at = 0, i = 0;
  for (; i + kScanChunk <= width; i += kScanChunk) {
    f32x16 top = load(x + i);
    for (int64_t j = 0; j < kScanChunk; j += kLanes) {
      const f32x16 v = load(x + i + j);
      top = max(top, v);
      usable = fma(max(lowest, v), nothing, usable);  // max keeps v where it is NaN
      finite = fma(v, nothing, finite);
    }
    if (maxima) store(maxima + i / kLanes, top);
    const float chunk = reduce_max(top);
    if (chunk > best) best = chunk, best_at = i;
  }
  bool tail_usable = true, tail_finite = true;
  for (int64_t j = i; j < width; ++j) {
    if (x[j] > best) best = x[j], best_at = j;
    if (!(x[j] < __builtin_inff())) tail_usable = false;
    if (!(x[j] - x[j] == 0.f)) tail_finite = false;
  }
  if (!tail_usable || reduce_add(usable) != 0.f || best == -__builtin_inff()) return {best, -1, kRowBroken};
  while (x[best_at] != best) ++best_at;
  const bool all_finite = tail_finite && reduce_add(finite) == 0.f;
  return {best, static_cast<int32_t>(best_at), all_finite ? kRowFinite : kRowMasked};
}

}  // namespace stretto::STRETTO_ISA
