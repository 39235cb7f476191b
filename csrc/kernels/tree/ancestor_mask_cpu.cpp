#include "kernels/tree/ancestor_mask.h"

#include "common/parallel.h"
#include "kernels/tree/tree.h"

namespace stretto::STRETTO_ISA {

void ancestor_mask(const AncestorMaskParams& p) {
  parallel_for(0, p.batch, 4096 / (p.nodes * p.words + 1) + 1, [&](int64_t b) {
    const int32_t* parent = p.parent + b * p.nodes;
    uint64_t* mask = p.mask + b * p.nodes * p.words;
    int32_t* depth = p.depth + b * p.nodes;
    const bool valid = valid_tree(parent, p.n[b], p.nodes);
    const int64_t n = valid ? p.n[b] : 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t w = 0; w < p.words; ++w) mask[i * p.words + w] = i ? mask[parent[i] * p.words + w] : 0;
      mask[i * p.words + i / 64] |= uint64_t(1) << (i % 64);
      depth[i] = i ? depth[parent[i]] + 1 : 0;
    }
    for (int64_t i = n * p.words; i < p.nodes * p.words; ++i) mask[i] = 0;
    for (int64_t i = n; i < p.nodes; ++i) depth[i] = valid ? 0 : -1;
  });
}

}  // namespace stretto::STRETTO_ISA
