// attention_with_probs: dense_attention that also writes its weights, so that other layers can use them: probs[b, h, i, j], zero where
// query i does not see key j. out and lse have the bits of dense_attention.
// apply_probs: out[b, i, h] = sum over j, in order, of probs[b, h, i, j] * v[b, j, h / group]. A value of weight zero is not read.
// FLOPs: as dense_attention, and half of that. Source: arXiv 2409.14595.
#pragma once
#include "kernels/attention/dense_attention.h"

namespace stretto {
struct AttentionWithProbsParams {
  AttentionTensors t;
  Visible visible;
  void* probs;  // [batch, heads, q_len, k_len] of probs_dtype, contiguous
  DType probs_dtype;
};
STRETTO_CPU_KERNEL(attention_with_probs, AttentionWithProbsParams)

struct ApplyProbsParams {
  AttentionTensors t;  // q, k, lse: not used
  const void* probs;   // [batch, heads, q_len, k_len] of probs_dtype, keys adjacent
  int64_t probs_batch, probs_head, probs_row;
  DType probs_dtype;
};
STRETTO_CPU_KERNEL(apply_probs, ApplyProbsParams)
}  // namespace stretto
