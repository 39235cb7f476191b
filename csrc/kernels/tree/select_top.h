// select_top: the tree of at most `keep` nodes with the best scores. Candidate 0 is the root and always kept; a candidate counts with
// the least score on its path, so that the choice is closed under parents; ties go to the lower index.
// Candidates with parent -1 (unused), and NaN or -inf on the path, are never kept. A malformed row (parent[0] != -1, parent[i] >= i or
// < -1) keeps nothing. out [batch, keep]: kept indices rising, -1 behind. No sort: see sampling/select.h.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct SelectTopParams {
  const float* scores;              // [batch, candidates]
  const int32_t* parent;            // [batch, candidates]
  int32_t* out;                     // [batch, keep]
  int64_t batch, candidates, keep;  // keep >= 1
};
STRETTO_CPU_KERNEL(select_top, SelectTopParams)
}  // namespace stretto
