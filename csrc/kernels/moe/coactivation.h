// coactivation: counts[a, b] = number of tokens that visit both expert a and expert b; counts[a, a] = tokens that visit a.
// A token that names an expert twice counts once a slot pair (routers do not). Ids out of range are skipped. 32-bit sums.
// Bytes: 4 num_tokens k, and the counts.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct CoactivationParams {
  const int32_t* chosen;  // [num_tokens, k]
  int32_t* counts;        // [experts, experts]
  int64_t num_tokens, k, experts;
};
STRETTO_CPU_KERNEL(coactivation, CoactivationParams)

// count_routes: counts[ids[t], chosen[t, j]] += 1 for each pair whose ids are both in range: the profile of which experts a token id visits.
struct CountRoutesParams {
  int32_t* counts;        // [vocab, experts]
  const int32_t* ids;     // [num_tokens]
  const int32_t* chosen;  // [num_tokens, k]
  int64_t num_tokens, k, vocab, experts;
};
STRETTO_CPU_KERNEL(count_routes, CountRoutesParams)
}  // namespace stretto
