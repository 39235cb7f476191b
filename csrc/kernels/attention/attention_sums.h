// attention_sums: how much attention each key receives, and each distance, without the matrix: the weights e^(score - lse) are made again
// from the lse of a pass over the same queries and keys, and summed.
//   columns[s, h, j] = sum over queries i that see j of weight(i, j)       (a segment's mass is the sum of its columns)
//   diagonals[s, h, j - i + q_len - 1] = sum over j - i of weight(i, j)    (the query's position minus the key's: k_len - 1 - index)
// Queries in order, in float: the same bits on every run and for any batch. NaN of a query reaches the keys it sees.
// FLOPs: 2 * head_dim * heads for each query and key it sees, and the exponential.
#pragma once
#include "kernels/attention/dense_attention.h"

namespace stretto {
struct AttentionSumsParams {
  AttentionTensors t;  // v, out: not used; lse is read
  Sequences sequences;
  Visible visible;
  float* columns;    // [batch, heads, k_len]
  float* diagonals;  // null, or [batch, heads, q_len + k_len - 1]; not with packed sequences
};
STRETTO_CPU_KERNEL(attention_sums, AttentionSumsParams)
}  // namespace stretto
