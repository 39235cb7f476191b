// permute_rows: out[i] = x[pairs[i] / k], the token of a (token, slot) pair; zeros where pairs[i] names no token (-1, or out of range).
// unpermute_rows: out[t] = sum_j weights[t, j] y[rows[t, j]] over j = 0 .. k-1 in order, by fma in float; a pair whose row is out of range
// (-1 by convention) adds nothing, and its weight is not looked at. A token's bits depend on its own pairs only.
// Bytes: both read and write each row once; unpermute_rows reads k rows for one it writes.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct PermuteRowsParams {
  const void* x;         // [tokens, width] of row_bytes each, rows x_stride_bytes apart
  const int32_t* pairs;  // [rows]
  void* out;             // [rows, width], contiguous; overlaps no input
  int64_t tokens, rows, k, row_bytes, x_stride_bytes;
};
STRETTO_CPU_KERNEL(permute_rows, PermuteRowsParams)

struct UnpermuteRowsParams {
  const void* y;         // [num_y, width] of dtype, rows y_stride apart
  const int32_t* rows;   // [tokens, k]
  const float* weights;  // null (all 1), or [tokens, k]
  void* out;             // [tokens, width] of dtype, contiguous; overlaps no input
  int64_t tokens, k, num_y, width, y_stride;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(unpermute_rows, UnpermuteRowsParams)
}  // namespace stretto
