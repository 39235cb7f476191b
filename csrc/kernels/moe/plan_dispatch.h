// plan_dispatch: who sends which token where, before any row moves. A token goes once to each device that holds one of its experts.
//   Sends are sorted by (source device, destination, token). For source s and destination d:
//   counts[s, d] = tokens sent, at most `capacity`;  offsets[s * D + d] = first of them in `tokens`;
//   recv_offsets[d, s] = first row that s fills in d's receive buffer, whose rows are ordered by source, then token;
//   slots[t, j] = place in `tokens` of the send that carries token t to the device of its j-th expert; -1 where that token is beyond the
//   capacity of (s, d), in token order, or the expert id is out of range (-1 by convention).
// `tokens` holds -1 from offsets[S * D] on. A source or device out of range counts as no pair. Integers only: the same result for any
// number of threads. Source: speculative MoE, arXiv 2503.04398; sending a row once per device also in DeepEP.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct PlanDispatchParams {
  const int32_t* chosen;     // [num_tokens, k]
  const int32_t* device_of;  // [experts]
  const int32_t* source_of;  // null (all from 0), or [num_tokens]
  int32_t* counts;           // [sources, devices]
  int32_t* offsets;          // [sources * devices + 1]
  int32_t* recv_offsets;     // [devices, sources + 1]
  int32_t* tokens;           // [max_sends], at least num_tokens * min(k, devices)
  int32_t* slots;            // [num_tokens, k]
  int64_t num_tokens, k, experts, sources, devices, max_sends;
  int64_t capacity;  // at least 0
};
STRETTO_CPU_KERNEL(plan_dispatch, PlanDispatchParams)
}  // namespace stretto
