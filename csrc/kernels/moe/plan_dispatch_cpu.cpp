#include "kernels/moe/plan_dispatch.h"

#include "kernels/moe/chunk_counts.h"

namespace stretto::STRETTO_ISA {

// source * devices + device of a pair, or -1.
STRETTO_INLINE int64_t key_of(const PlanDispatchParams& p, int64_t token, int64_t j) {
  const int64_t source = p.source_of ? p.source_of[token] : 0, expert = p.chosen[token * p.k + j];
  if (source < 0 || source >= p.sources || expert < 0 || expert >= p.experts) return -1;
  const int64_t device = p.device_of[expert];
  return device < 0 || device >= p.devices ? -1 : source * p.devices + device;
}

// The first pair of the token with the same key: j itself unless an earlier one goes to that device.
STRETTO_INLINE int64_t first_with(const PlanDispatchParams& p, int64_t token, int64_t j, int64_t key) {
  for (int64_t i = 0; i < j; ++i)
    if (key_of(p, token, i) == key) return i;
  return j;
}

static void place_token(const PlanDispatchParams& p, int64_t token, int32_t* place) {
  int32_t* slots = p.slots + token * p.k;
  for (int64_t j = 0; j < p.k; ++j) {
    const int64_t key = key_of(p, token, j), first = key < 0 ? j : first_with(p, token, j, key);
    if (first < j) {
      slots[j] = slots[first];
      continue;
    }
    slots[j] = -1;
    if (key < 0 || place[key] >= p.capacity) continue;
    slots[j] = p.offsets[key] + place[key]++;
    p.tokens[slots[j]] = static_cast<int32_t>(token);
  }
}

void plan_dispatch(const PlanDispatchParams& p) {
  const int64_t keys = p.sources * p.devices, chunk = 1024 > 4 * keys ? 1024 : 4 * keys;
  const ChunkCounts c = count_chunks(p.num_tokens, keys, chunk, [&](int64_t first, int64_t last, int32_t* counts) {
    for (int64_t token = first; token < last; ++token)
      for (int64_t j = 0; j < p.k; ++j) {
        const int64_t key = key_of(p, token, j);
        if (key >= 0 && first_with(p, token, j, key) == j) ++counts[key];
      }
  });
  sum_over_chunks(c, p.counts);
  p.offsets[0] = 0;
  for (int64_t key = 0; key < keys; ++key) {
    if (p.counts[key] > p.capacity) p.counts[key] = static_cast<int32_t>(p.capacity);
    p.offsets[key + 1] = p.offsets[key] + p.counts[key];
  }
  for (int64_t d = 0; d < p.devices; ++d) {
    int32_t* begins = p.recv_offsets + d * (p.sources + 1);
    begins[0] = 0;
    for (int64_t s = 0; s < p.sources; ++s) begins[s + 1] = begins[s] + p.counts[s * p.devices + d];
  }
  for (int64_t i = p.offsets[keys]; i < p.max_sends; ++i) p.tokens[i] = -1;
  parallel_for(0, c.chunks, 1, [&](int64_t task) {
    const int64_t last = (task + 1) * chunk < p.num_tokens ? (task + 1) * chunk : p.num_tokens;
    for (int64_t token = task * chunk; token < last; ++token) place_token(p, token, c.table + task * keys);
  });
}

}  // namespace stretto::STRETTO_ISA
