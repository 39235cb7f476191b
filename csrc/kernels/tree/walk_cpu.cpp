#include "kernels/tree/walk.h"

#include "common/parallel.h"
#include "kernels/tree/tree.h"

namespace stretto::STRETTO_ISA {

void walk(const WalkParams& p) {
  parallel_for(0, p.batch, 4096 / (p.nodes + 1) + 1, [&](int64_t b) {
    const int64_t at = b * p.nodes;
    const int32_t *next = p.next + at, *tokens = p.tokens + at, *parent = p.parent + at;
    int32_t* path = p.path + at;
    for (int64_t i = 0; i < p.nodes; ++i) path[i] = -1;
    p.accepted[b] = p.bonus[b] = -1;
    if (!valid_tree(parent, p.n[b], p.nodes)) return;
    p.accepted[b] = 0;
    if (p.n[b] == 0) return;
    int32_t node = 0, length = 1;
    path[0] = 0;
    for (int32_t i = 1; i < p.n[b]; ++i)  // children come after their parent, so one pass is enough
      if (parent[i] == node && tokens[i] >= 0 && tokens[i] == next[node]) path[length++] = node = i;
    p.accepted[b] = length - 1;
    p.bonus[b] = next[node] >= 0 ? next[node] : -1;
  });
}

}  // namespace stretto::STRETTO_ISA
