// sparse_prefill: attention in which each block of queries has its own list of keys: intervals, and single keys (columns) beside them.
// Block b of a head is queries b * block .. (b + 1) * block; it sees intervals[interval_ptr[b] .. interval_ptr[b + 1]] and
// columns[column_ptr[b] .. column_ptr[b + 1]], both growing and apart from each other (checked); if causal, a query at row i sees those of
// them that are not behind its position i + k_len - q_len. Lists are a batch entry's and a head's own, or shared by all (size 1).
// The keys of a block are taken in growing order, 256 at a time: the result has the bits of dense_attention over these keys, gathered.
// Where the list is 0 .. k_len that is dense_attention itself. An empty list gives zeros and lse = -inf.
// FLOPs: 4 * heads * head_dim for each query and key it sees. Source: arXiv 2407.02490 (vertical and slash lines), 2501.15383.
#pragma once
#include "kernels/attention/attention_tensors.h"

namespace stretto {
struct SparsePrefillParams {
  AttentionTensors t;
  const int32_t *interval_ptr, *column_ptr;  // [list_batch, list_heads, blocks + 1]
  const int32_t* intervals;                  // [n, 2]: begin, end
  const int32_t* columns;                    // [n]
  int64_t num_intervals, num_columns;
  int64_t list_batch, list_heads;  // 1, or batch and heads
  int64_t blocks, block;
  bool causal;
};
STRETTO_CPU_KERNEL(sparse_prefill, SparsePrefillParams)
}  // namespace stretto
