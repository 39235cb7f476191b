// linear: out[r, j] = epilogue(sum_k x[r, k] * w[j, k]) for weights packed as formats.h says.
//
// Quantised weights: x is quantised per 32 values to int8 (d_x = max|x| / 127, round half to even; a block with max|x| < 2^-120 is zero),
// and for each block of 32, in order of k, with exact integers:
//   sum = fma(float(sum q_w q_x) * d_w, d_x, sum);   with a minimum also   sum = fma(m, d_x * float(sum q_x), sum)
// Float weights: sum = fma(w, x, sum) in order of k, moved to a total after every 256 k.
// One output is one lane in both, so its bits depend on its own row of x and of w only: not on the number of rows, tiles, threads.
// avx2 and avx512 agree to the bit; scalar has no fma and differs in rounding. A row with NaN or infinity in x gets NaN (quantised)
// and changes no other row. Epilogue, in this order: + bias, gate, + residual.
// Bytes: the packed weights once for up to 8 rows, x and out once. Operations: 2 * rows * n * k.
#pragma once
#include "common/isa.h"
#include "kernels/quant/formats.h"

namespace stretto {

enum class Gate : int32_t { none, silu, gelu_tanh };

struct LinearParams {
  const float* x;           // [rows, k], rows x_stride apart; may be out only for quantised formats
  const uint8_t* packed;    // 32-byte aligned
  const float* bias;        // null, or [n] in packed order
  const float* residual;    // null, or [rows, out columns], rows residual_stride apart; may be out
  float* out;               // [rows, n], with a gate [rows, n / 2]; rows out_stride apart
  const int32_t* num_rows;  // null, or [1]: only rows below it are read and written
  int64_t rows, n, k, x_stride, residual_stride, out_stride;
  WeightFormat format;
  Gate gate;  // other than none: groups alternate between gate and up, n a multiple of 32; out = act(gate) * up
};
STRETTO_CPU_KERNEL(linear, LinearParams)
}  // namespace stretto
