// slstm: scalar memory with exponential gates and recurrent weights, one head at a time. Per token, with y, c, n, m of the token before:
//   (i, f, z, o)[g, e] = Wx[g, e] + b[g, e] + sum_d y[d] R[d, g, e];  lf = log sigmoid(f)
//   m' = max(lf + m, i), or i where n is 0 (a cell that holds nothing yet);  c' = e^(lf + m - m') c + e^(i - m') tanh(z)
//   n' = e^(lf + m - m') n + e^(i - m');  y' = sigmoid(o) c' / n'
// Tokens depend on each other through y: nothing runs in parallel but heads and sequences. Sequences of a group share each load of R.
// The sum over d is one chain of fused multiply-adds that starts at Wx + b, so a row's bits do not depend on its neighbours.
// NaN stays in its sequence and head. Bytes: Wx and y once, R once a token and group of sequences. Source: arXiv 2405.04517.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct SlstmParams {
  const void* Wx;             // [tokens, 4, heads, dim] of dtype, strides below, elements contiguous
  const void* R;              // [heads, dim, 4, dim] of weight_dtype, contiguous
  const float* b;             // [4, heads, dim]
  float* state;               // [slots, 4, heads, dim]: y, c, n, m
  void* out;                  // [tokens, heads, dim] of dtype, contiguous; overlaps no input
  const int32_t* cu_seqlens;  // [batch + 1], or null: one token a sequence. What lies outside [0, tokens) is not touched
  const int32_t* slots;       // null: sequence b has slot b. Outside [0, num_slots): an idle sequence, its out is zero
  int64_t batch, tokens, num_slots, heads, dim, token_stride, gate_stride, head_stride;
  bool update;  // false: the state is read only
  DType dtype, weight_dtype;
};
STRETTO_CPU_KERNEL(slstm, SlstmParams)
}  // namespace stretto
