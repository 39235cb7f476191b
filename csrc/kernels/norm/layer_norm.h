// layer_norm: out[r, i] = (x[r, i] - m) / sqrt(v + eps) * weight[i] + bias[i], m = mean_i(x[r, i]), v = mean_i((x[r, i] - m)^2)
// Two passes over the row, so that a mean far from zero costs no digits. Sums in float, in four times sixteen lanes and a fixed tree:
// a row's bits depend on that row alone. A NaN or infinity in a row makes that row NaN, and so does a sum beyond the range of float.
// A row of equal values becomes the bias when eps > 0, up to the rounding of the mean.
// Bytes: rows * width * 2 * sizeof(T) + width * 2 * sizeof(float). Source: arXiv 1607.06450.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct LayerNormParams {
  const void* x;            // [rows, width] of dtype; rows x_stride elements apart, elements contiguous
  const float* weight;      // [width]
  const float* bias;        // null, or [width]
  void* out;                // [rows, width] of dtype, rows out_stride apart; may be x itself
  const int32_t* num_rows;  // null, or [1]: only rows below it are read and written
  int64_t rows, width, x_stride, out_stride;
  float eps;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(layer_norm, LayerNormParams)
}  // namespace stretto
