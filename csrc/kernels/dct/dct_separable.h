// dct_separable: out[b, u, v, c] = sum_i sum_j H[u, i] W[v, j] x[b, i, j, c], two small matrices of the cosine transform along the axes
// of a grid, each channel alone. Low-pass, its adjoint, and low-pass with the inverse of the kept size are all of this form.
//
// The matrices have a mirror symmetry, so a line splits into a half that sees sums and a half that sees differences, which halves the
// multiplications:
//   input:  folded, s_j = x_j + x_{n-1-j}, d_j = x_j - x_{n-1-j} (a middle x_j counts once, in s);   or dealt, s_j = x_{2j}, d_j = x_{2j+1}
//   halves: e = even s, o = odd d, each summed in order of j with fma, in float
//   output: folded, y_i = e_i + o_i, y_{m-1-i} = e_i - o_i (a middle y_i = e_i);                      or dealt, y_{2i} = e_i, y_{2i+1} = o_i
// x is read once; the half-transformed lines of a block of channels stay in L2. An output's bits depend on its own image and channel
// only. NaN and infinities stay in their channel. Bytes: x once, out once. Operations: per channel about w' w h + h' h w' (' output sizes).
// Source: the DCT's symmetry is textbook (Rao and Yip 1990); use on vision tokens: arXiv 2508.06038.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct DctAxis {
  const float* even;             // [ceil(in / 2), pitch]: coefficient of s_j for e_i at [j, i], zero from ceil(out / 2) on
  const float* odd;              // [floor(in / 2), pitch]: the same of d_j for o_i, zero from floor(out / 2) on
  int64_t in, out;               // lengths of a line before and after
  int64_t pitch;                 // multiple of 4, at least ceil(out / 2)
  int64_t x_stride, out_stride;  // elements between neighbours on this axis
};
struct DctSeparableParams {
  const void* x;         // [batch, outer.in, inner.in, channels] of dtype, channels contiguous
  void* out;             // [batch, outer.out, inner.out, channels] of dtype, channels contiguous, overlaps no input
  DctAxis outer, inner;  // inner is transformed first; the caller names the axes so that this is the cheaper order
  int64_t batch, channels, x_batch_stride, out_batch_stride;
  bool fold_in, fold_out;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(dct_separable, DctSeparableParams)
}  // namespace stretto
