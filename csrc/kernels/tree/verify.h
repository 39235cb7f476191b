// verify: exact acceptance of drafts that were really drawn from q. The output law is p's, whatever q is.
// At a node, r = p; its children in order: x is accepted where u q(x) < r(x) (both normalised), else r = norm(max(0, r - q)), and, for
// siblings drawn without replacement, q loses x and is renormalised. Where no child is accepted, the bonus is drawn from r. A residual
// of mass 1e-12 or less is rounding: p takes its place. A chain is a tree of single children, for which both rules are one.
//   u of child k: accept noise at index k, of the position that the child fills; bonus: token noise of its position, inverse CDF
//   path [batch, nodes]: accepted nodes from 0 on, -1 behind;  accepted [batch]: nodes on the path without the root
//   bonus [batch]: -1 where the law is no row of weights (NaN, infinity, nothing)
// Idle slot (n = 0): path all -1, accepted 0, bonus -1. Malformed tree, or a draft that q gives no weight: path all -1, accepted and bonus -1.
// Source: arXiv 2211.17192, 2302.01318 (chain), 2305.09781 (siblings). Sums in double.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct VerifyParams {
  const float *p, *q;              // [batch, nodes, vocab]; row i: the laws after node i
  const int32_t *tokens, *parent;  // [batch, nodes]
  const int32_t* n;                // [batch]
  const int64_t *seed, *lineage;   // [batch]
  const int32_t* pos;              // [batch]: the position that a child of the root fills
  int32_t *path, *accepted, *bonus;
  int64_t batch, nodes, vocab;
  bool replacement;  // siblings were drawn independently
};
STRETTO_CPU_KERNEL(verify, VerifyParams)
}  // namespace stretto
