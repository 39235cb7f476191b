// ancestor_mask: bit j of mask[b, i] is set where node j is i or an ancestor of i; depth[b, i] is the distance to the root.
// Unused slots: mask 0, depth 0. A malformed tree: mask 0, depth -1 in every slot. Bytes: B * N * (8 + 8 * words).
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct AncestorMaskParams {
  const int32_t* parent;        // [batch, nodes]
  const int32_t* n;             // [batch]: nodes in use
  uint64_t* mask;               // [batch, nodes, words]
  int32_t* depth;               // [batch, nodes]
  int64_t batch, nodes, words;  // words = ceil(nodes / 64)
};
STRETTO_CPU_KERNEL(ancestor_mask, AncestorMaskParams)
}  // namespace stretto
