// warp: from logits to the distribution that is sampled. Per row, in this order:
//   temperature   e(x) = exp((l(x) - max l) / temperature); 0 gives all probability to the lowest id among the largest
//   top_k         the first k tokens by (logit falling, id rising); <= 0 keeps all
//   top_p         the shortest run of that order whose mass is >= top_p of what top_k left, at least one token; >= 1 keeps all
//   min_p         tokens with e(x) >= min_p * e(largest); <= 0 keeps all
// then p = e / sum e over what is left, zero elsewhere. Equal logits at a boundary: lower ids stay. Order is taken on the logits as
// given, masses are summed in double, so the result is a function of the row alone.
// A row with NaN or +inf, without a finite entry, or with a parameter out of range becomes NaN, and status says which (RowStatus).
// No full sort: candidates are bounded first (k-th largest of lane maxima; tail mass), then one histogram in the logits finds the
// bin of the boundary and only that bin is ordered. Bytes: rows * width * 8.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct WarpParams {
  const float* logits;       // [rows, width], rows logits_stride apart
  const float* temperature;  // [rows], finite, >= 0
  const int32_t* top_k;      // [rows], >= 0; 0 keeps all
  const float* top_p;        // [rows], in [0, 1]
  const float* min_p;        // [rows], in [0, 1]
  float* out;                // [rows, width], rows out_stride apart; overlaps no input
  int32_t* status;           // null, or [rows]
  const int32_t* num_rows;   // null, or [1]: only rows below it are read and written
  int64_t rows, width, logits_stride, out_stride;
};
STRETTO_CPU_KERNEL(warp, WarpParams)
}  // namespace stretto
