#include "kernels/moe/coactivation.h"

#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

void coactivation(const CoactivationParams& p) {
  constexpr int64_t kOwned = 32;  // experts whose rows one task writes: it looks at every token, and counts for its own only
  parallel_for(0, (p.experts + kOwned - 1) / kOwned, 1, [&](int64_t task) {
    const int64_t first = task * kOwned, last = first + kOwned < p.experts ? first + kOwned : p.experts;
    std::memset(p.counts + first * p.experts, 0, static_cast<size_t>((last - first) * p.experts) * sizeof(int32_t));
    for (const int32_t* token = p.chosen; token < p.chosen + p.num_tokens * p.k; token += p.k)
      for (int64_t i = 0; i < p.k; ++i) {
        if (token[i] < first || token[i] >= last) continue;
        int32_t* row = p.counts + token[i] * p.experts;
        for (int64_t j = 0; j < p.k; ++j)
          if (token[j] >= 0 && token[j] < p.experts) ++row[token[j]];
      }
  });
}

void count_routes(const CountRoutesParams& p) {  // one thread: token ids repeat, and the counts are shared
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.ids[t] < 0 || p.ids[t] >= p.vocab) continue;
    int32_t* row = p.counts + p.ids[t] * p.experts;
    for (int64_t j = t * p.k; j < (t + 1) * p.k; ++j)
      if (p.chosen[j] >= 0 && p.chosen[j] < p.experts) ++row[p.chosen[j]];
  }
}

}  // namespace stretto::STRETTO_ISA
