#include "kernels/attention/attention_sums.h"

#include "kernels/attention/dense_block.h"

namespace stretto::STRETTO_ISA {

// to[0 .. n) += x; n may be more than 16.
STRETTO_INLINE void add_lanes(float* to, f32x16 x, int64_t n) {
  if (n >= kLanes) return store(to, add(load(to), x));
  store_first(to, add(load_first(to, static_cast<int>(n)), x), static_cast<int>(n));
}

template <class T> static void sum_block(const AttentionSumsParams& p, RowBlock<T>& block, const DenseSequence& s, const BlockRows& b, float* columns,
                                         float* diagonals) {
  const int64_t first = b.first - s.q_begin;
  const int64_t begin = keys_of(s, p.visible, first).begin, end = keys_of(s, p.visible, first + b.queries - 1).end;
  begin_rows(block, p.t, b);
  for (int64_t base = begin / kSplit * kSplit; base < end; base += kSplit) {
    set_keys(block, p.t, s, b.head / p.t.group(), base, end);
    set_seen(block, s, p.visible, b, base);
    block.score_split();
    for (int r = 0; r < b.count(); ++r) {
      const f32x16 lse = broadcast(p.t.lse[(b.entry * p.t.q_len + b.query(r)) * p.t.heads + b.head]);
      for (int j = 0; j < block.keys.count; j += kLanes) {
        const uint32_t bits = block.lanes_of(block.seen[r], j);
        if (!bits) continue;
        const f32x16 weight = select(bits, exp(sub(block.capped(load(block.score_row(r) + j)), lse)), zero());
        const int64_t left = block.keys.count - j;
        add_lanes(columns + base + j, weight, left);
        if (diagonals) add_lanes(diagonals + base + j - (first + r) + p.t.q_len - 1, weight, left);
      }
    }
  }
}

template <class T> static void sum_head(const AttentionSumsParams& p, int64_t sequence, int64_t head) {
  const AttentionTensors& t = p.t;
  const DenseSequence s = dense_sequence(t, p.sequences, sequence);
  float* columns = p.columns + (s.entry * t.heads + head) * t.k_len + s.k_begin;
  float* diagonals = p.diagonals ? p.diagonals + (s.entry * t.heads + head) * (t.q_len + t.k_len - 1) : nullptr;
  for (int64_t j = 0; j < s.k_rows; ++j) columns[j] = 0.f;
  for (int64_t j = 0; diagonals && j < t.q_len + t.k_len - 1; ++j) diagonals[j] = 0.f;
  RowBlock<T> block(t.head_dim, t.softcap, false, block_memory<T>(t));
  for (int64_t first = 0; first < s.q_rows; first += kMaxRows)
    sum_block(p, block, s, BlockRows{s.entry, s.q_begin + first, s.q_rows - first < kMaxRows ? s.q_rows - first : kMaxRows, head, 1}, columns,
              diagonals);
}

void attention_sums(const AttentionSumsParams& p) {
  dispatch_float(p.t.dtype, [&](auto tag) {
    parallel_for(0, p.sequences.count * p.t.heads, 1, [&](int64_t i) { sum_head<typename decltype(tag)::type>(p, i / p.t.heads, i % p.t.heads); });
  });
}

}  // namespace stretto::STRETTO_ISA
