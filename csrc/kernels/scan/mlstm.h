// mlstm: matrix memory with exponential gates. Per sequence and head, with i and f the raw gates (soft-capped first when cap > 0:
// cap * tanh(x / cap)), lf = log sigmoid(f), starting from the given C, n, m:
//   m' = max(lf + m, i);  a = e^(lf + m - m');  b = e^(i - m');  C' = a C + b k v^T;  n' = a n + b k
//   h  = (scale q^T C') / (max(|scale q^T n'|, e^-m') + eps)
// sigmoid variant: a = sigmoid(f), b = sigmoid(i), h = scale q^T C'; n and m are neither read nor written.
//
// The arithmetic. Either a or b is exactly 1 (m' is one of the two it is the maximum of), and a is 1 except where a gate sets a
// record. So C stays in registers, a tile of it at a time, while a block of tokens passes: per token one fused multiply-add to
// write and one to read, 4 * dk * dv FLOPs, fewer than the chunkwise form needs (that adds 2 * L * (dk + dv) for chunks of L).
// And the bits are those of one token after another: a sequence may be cut anywhere, fed whole, or stepped, with the same result.
//
// Orders of summation: h over dk, one chain of fused multiply-adds; q^T n over dk in 16 lanes and the fixed tree; tokens in order.
// NaN in a gate makes NaN of that sequence and head from there on. i = -inf adds nothing; m = -inf is an empty memory (h = 0).
// e^-m may overflow to infinity without a cap; h is 0 then, its limit.
// Bytes: q, k, v, h once, C read and written once for each block of tokens (once in a step). Source: arXiv 2405.04517, 2503.14376.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct MlstmStrides { int64_t batch, token, head; };  // elements; the last dimension is contiguous

struct MlstmParams {
  const void *q, *k, *v;  // [tokens, heads, dk | dv] of dtype; q null: only the state is wanted
  const void *i, *f;      // [tokens, heads] of gate_dtype
  void* out;              // as v; null with q; overlaps no input
  float *C, *n, *m;       // [slots, heads, dk, dv], [slots, heads, dk], [slots, heads], contiguous; n and m null when sigmoid
  // Tokens of sequence b: cu_seqlens[b] to cu_seqlens[b + 1] where given (then strides.batch is not used), else seq_len from
  // strides.batch * b. Where counts is given only the first counts[b] of them. What lies outside [0, tokens) is not touched.
  const int32_t *cu_seqlens, *counts;
  const int32_t* slots;  // null: sequence b has slot b. Outside [0, num_slots): an idle sequence, its out is zero, no state is touched.
                         // Slots of one call differ, unless update is false.
  int64_t batch, tokens, seq_len, num_slots, heads, dk, dv;
  MlstmStrides q_strides, k_strides, v_strides, i_strides, f_strides, out_strides;
  int64_t block;  // tokens that pass a tile of C at a time; at least 1; changes no bit
  float scale, eps, cap;
  bool sigmoid;
  bool update;  // false: the state is read only (guesses are checked against a state that stays)
  DType dtype, gate_dtype;
};
STRETTO_CPU_KERNEL(mlstm, MlstmParams)
}  // namespace stretto
