#include "kernels/moe/sort_by_expert.h"

#include "kernels/moe/chunk_counts.h"

namespace stretto::STRETTO_ISA {

void sort_by_expert(const SortByExpertParams& p) {
  // A chunk is worth a hand-over (about 4 us) and its counts, which are zeroed and summed, are few beside its items.
  const int64_t chunk = 4096 > 8 * p.experts ? 4096 : 8 * p.experts;
  auto legal = [&](int64_t i) { return p.chosen[i] >= 0 && p.chosen[i] < p.experts; };
  const ChunkCounts c = count_chunks(p.num_pairs, p.experts, chunk, [&](int64_t first, int64_t last, int32_t* counts) {
    for (int64_t i = first; i < last; ++i)
      if (legal(i)) ++counts[p.chosen[i]];
  });
  sum_over_chunks(c, p.counts);
  p.offsets[0] = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t end = p.offsets[e] + (p.counts[e] + p.multiple - 1) / p.multiple * p.multiple;
    p.offsets[e + 1] = static_cast<int32_t>(end);
    for (int64_t i = p.offsets[e] + p.counts[e]; i < end; ++i) p.pairs[i] = -1;
  }
  for (int64_t i = p.offsets[p.experts]; i < p.capacity; ++i) p.pairs[i] = -1;
  parallel_for(0, c.chunks, 1, [&](int64_t task) {
    int32_t* place = c.table + task * c.keys;
    const int64_t last = (task + 1) * chunk < p.num_pairs ? (task + 1) * chunk : p.num_pairs;
    for (int64_t i = task * chunk; i < last; ++i) {
      if (!legal(i)) {
        p.rows[i] = -1;
        continue;
      }
      const int32_t row = p.offsets[p.chosen[i]] + place[p.chosen[i]]++;
      p.rows[i] = row;
      p.pairs[row] = static_cast<int32_t>(i);
    }
  });
}

}  // namespace stretto::STRETTO_ISA
