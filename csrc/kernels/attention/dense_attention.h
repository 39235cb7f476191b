// dense_attention: softmax(scale q K^T) V over plain tensors, ragged, with grouped heads.
// A query at row i of a sequence with n queries and m keys has position i + m - n: the last query stands at the last key. It sees keys
// up to its position if causal, and with a window only keys less than `window` positions away. A row that sees no key gives zeros and
// lse = -inf.
// Sums in float, keys in splits of 256 at fixed positions, joined in order: a row's bits depend on its query and the keys it sees, and
// equal those of paged_attention over the same values. NaN and infinities of keys and values reach only the rows that see them.
// FLOPs: 4 * heads * head_dim for each query and key it sees. Source: arXiv 1805.02867, 2205.14135.
#pragma once
#include "kernels/attention/attention_tensors.h"

namespace stretto {
// Sequences in plain tensors: one a batch entry, or packed in the only entry, sequence s in rows cu_q[s] .. cu_q[s + 1] (checked).
struct Sequences {
  const int32_t *cu_q, *cu_k;  // null, or [count + 1]
  int64_t count;
};
// Which keys a query sees.
struct Visible {
  bool causal;
  int64_t window;  // 0: none
};

struct DenseAttentionParams {
  AttentionTensors t;
  Sequences sequences;
  Visible visible;
};
STRETTO_CPU_KERNEL(dense_attention, DenseAttentionParams)
}  // namespace stretto
