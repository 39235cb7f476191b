// rms_norm: out[r, i] = x[r, i] * weight[i] / sqrt(mean_i(x[r, i]^2) + eps), plus residual[r, i] where one is given
// Sums in float, in 16 lanes and a fixed tree, so a row's bits depend on that row alone. A NaN in a row makes that row NaN.
// A row of zeros stays zero when eps > 0. Bytes: rows * width * 2 * sizeof(T) + width * sizeof(float). Source: arXiv 1910.07467.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct RmsNormParams {
  const void* x;            // [rows, width] of dtype; rows x_stride elements apart, elements contiguous
  const float* weight;      // [width]
  const void* residual;     // null, or [rows, width] of dtype, rows residual_stride apart
  void* out;                // [rows, width] of dtype, rows out_stride apart; may be x or residual itself
  const int32_t* num_rows;  // null, or [1]: only rows below it are read and written
  int64_t rows, width, x_stride, residual_stride, out_stride;
  float eps;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(rms_norm, RmsNormParams)
}  // namespace stretto
