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
}  // namespace stretto
