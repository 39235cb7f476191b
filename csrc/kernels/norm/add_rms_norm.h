// add_rms_norm: sum[r, i] = x[r, i] + residual[r, i], rounded to the tensors' type; out[r] = rms_norm(sum[r]), with its bits.
// The step between two layers of a pre-norm network: `sum` is the residual stream, `out` what the next layer reads.
// A row's bits depend on that row alone. A NaN in a row of x or residual makes that row of out NaN.
// Bytes: rows * width * 4 * sizeof(T) + width * sizeof(float); apart, the two ops move 5 * sizeof(T). Source: arXiv 1910.07467.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct AddRmsNormParams {
  const void *x, *residual;  // [rows, width] of dtype; rows x_stride and residual_stride elements apart, elements contiguous
  const float* weight;       // [width]
  void* out;                 // [rows, width] of dtype, rows out_stride apart; may be x, or residual, but not sum
  void* sum;                 // [rows, width] of dtype, rows sum_stride apart; may be residual, or x
  const int32_t* num_rows;   // null, or [1]: only rows below it are read and written
  int64_t rows, width, x_stride, residual_stride, out_stride, sum_stride;
  float eps;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(add_rms_norm, AddRmsNormParams)
}  // namespace stretto
