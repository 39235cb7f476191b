// merge_states: joins two attention results computed over disjoint sets of keys.
//   m = max(la, lb);  s = e^(la-m) + e^(lb-m);  out = (e^(la-m) a + e^(lb-m) b) / s;  lse = m + log(s)
// An empty set has lse = -inf and its values are never read; two empty sets give zeros and -inf. A NaN in an lse makes its row NaN.
// Bytes: rows * (3 * head_dim * sizeof(T) + 12). Source: online softmax, arXiv 1805.02867.
#pragma once
#include <cmath>

#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct MergeStatesParams {
  const void *a, *b;           // [rows, head_dim] of dtype, contiguous; rows = tokens * heads, may be 0
  const float *lse_a, *lse_b;  // [rows], natural logarithm
  void* out;                   // as a; overlaps no input, nor does lse_out
  float* lse_out;
  int64_t rows, head_dim;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(merge_states, MergeStatesParams)

struct MergeWeights { float a, b, lse; };

STRETTO_HD static inline MergeWeights merge_weights(float lse_a, float lse_b) {
  const float m = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;                               // NaN stays
  if (m == -INFINITY) return {0.f, 0.f, m};                                                      // (-inf) - (-inf) would be NaN
  const float ea = lse_a == m ? 1.f : expf(lse_a - m), eb = lse_b == m ? 1.f : expf(lse_b - m);  // m may be +inf
  const float s = ea + eb;
  return {ea / s, eb / s, m + logf(s)};
}
}  // namespace stretto
