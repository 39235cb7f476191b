// walk: greedy, Point and Coupled acceptance. next[b, i] is the target's own token after node i (argmax, or the draw keyed by position).
// From the root: where a child carries next, move there (the first such child), else stop; next at the stop is the bonus.
//   path [batch, nodes]: accepted nodes from 0 on, -1 behind;  accepted [batch]: nodes on the path without the root
//   bonus [batch]: -1 where next is negative (the target had no token)
// Idle slot (n = 0): path all -1, accepted 0, bonus -1. Malformed tree: path all -1, accepted -1, bonus -1.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct WalkParams {
  const int32_t *next, *tokens, *parent;  // [batch, nodes]
  const int32_t* n;                       // [batch]
  int32_t *path, *accepted, *bonus;
  int64_t batch, nodes;
};
STRETTO_CPU_KERNEL(walk, WalkParams)
}  // namespace stretto
