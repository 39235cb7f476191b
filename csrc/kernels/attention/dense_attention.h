// dense_attention: softmax(scale q K^T) V over plain tensors, ragged, with grouped heads.
// A query at row i of a sequence with n queries and m keys has position i + m - n: the last query stands at the last key. It sees keys
// up to its position if causal, and with a window only keys less than `window` positions away. softcap: scores become
// softcap * tanh(score / softcap). lse is the natural log of the sum of exponentials. A row that sees no key gives zeros and lse = -inf.
// Sums in float, keys in splits of 256 at fixed positions, joined in order: a row's bits depend on its query and the keys it sees, and
// equal those of paged_attention over the same values. NaN and infinities of keys and values reach only the rows that see them.
// FLOPs: 4 * heads * head_dim for each query and key it sees. Source: arXiv 1805.02867, 2205.14135.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {

// [batch, rows, heads, head_dim] in elements, head_dim adjacent.
struct RowStrides { int64_t batch, row, head; };

struct DenseAttentionParams {
  const void *q, *k, *v;  // of dtype
  void* out;              // as q, overlaps no input
  float* lse;             // [batch, q_len, heads], contiguous
  const int32_t *cu_q, *cu_k;  // null, or [seqs + 1]: sequence s owns rows cu[s] .. cu[s + 1] of the only batch entry; checked
  int64_t seqs;                // batch, or the sequences of cu_q
  int64_t q_len, k_len;        // rows of a batch entry
  int64_t heads, kv_heads, head_dim;
  RowStrides q_strides, k_strides, v_strides, out_strides;
  int64_t window;  // 0: none
  float scale, softcap;
  bool causal;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(dense_attention, DenseAttentionParams)
}  // namespace stretto
