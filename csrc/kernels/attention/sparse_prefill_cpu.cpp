#include "kernels/attention/sparse_prefill.h"

#include "kernels/attention/dense_block.h"

namespace stretto::STRETTO_ISA {

// The keys of a block in growing order.
struct KeyWalk {
  const int32_t *interval, *interval_end, *column, *column_end;
  int32_t next;  // within *interval

  void begin_interval() {
    if (interval < interval_end) next = *interval > 0 ? *interval : 0;
  }

  // Up to kSplit keys below `limit`; returns their number.
  int take(int64_t limit, int32_t* positions) {
    int n = 0;
    while (n < kSplit) {
      const bool single = column < column_end && (interval >= interval_end || *column < next);
      if (!single && interval >= interval_end) break;
      if ((single ? *column : next) >= limit) break;
      if (single) {
        positions[n++] = *column > 0 ? *column : 0;
        ++column;
        continue;
      }
      const int64_t stop = interval[1] < limit ? interval[1] : limit;
      while (next < stop && n < kSplit) positions[n++] = next++;
      if (next < interval[1]) continue;
      interval += 2;
      begin_interval();
    }
    return n;
  }
};

// Offsets are clamped: a recorded step may meet lists that nobody has checked.
static KeyWalk walk_of(const SparsePrefillParams& p, int64_t entry, int64_t head, int64_t block) {
  const int64_t list = (p.list_batch == 1 ? 0 : entry) * p.list_heads + (p.list_heads == 1 ? 0 : head), at = list * (p.blocks + 1) + block;
  const auto within = [](int64_t x, int64_t n) { return x < 0 ? 0 : x > n ? n : x; };
  KeyWalk w{p.intervals + 2 * within(p.interval_ptr[at], p.num_intervals), p.intervals + 2 * within(p.interval_ptr[at + 1], p.num_intervals),
            p.columns + within(p.column_ptr[at], p.num_columns), p.columns + within(p.column_ptr[at + 1], p.num_columns), 0};
  w.begin_interval();
  return w;
}

// How many of n growing positions are at most `last`.
STRETTO_INLINE int count_up_to(const int32_t* positions, int n, int64_t last) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (positions[middle] <= last) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class T> static void attend_rows(const SparsePrefillParams& p, const BlockRows& b, int64_t kv_head, KeyWalk walk) {
  const AttentionTensors& t = p.t;
  RowBlock<T> block(t.head_dim, t.softcap, false, block_memory<T>(t));
  begin_rows(block, t, b);
  const T* key = static_cast<const T*>(t.k) + t.k_strides.at(b.entry, 0, kv_head);
  const T* value = static_cast<const T*>(t.v) + t.v_strides.at(b.entry, 0, kv_head);
  const int64_t shift = t.k_len - t.q_len, limit = p.causal ? b.first + b.queries + shift : t.k_len;
  int32_t positions[kSplit];
  while (const int n = walk.take(limit, positions)) {
    block.keys.count = n;
    for (int j = 0; j < n; ++j) {
      block.keys.key[j] = key + positions[j] * t.k_strides.row;
      block.keys.value[j] = value + positions[j] * t.v_strides.row;
    }
    for (int64_t i = 0; i < b.queries; ++i) {
      const SeenKeys seen = seen_range(0, p.causal ? count_up_to(positions, n, b.first + i + shift) : n);
      for (int64_t h = 0; h < b.heads; ++h) block.seen[i * b.heads + h] = seen;
    }
    block.join_split();
  }
  finish_rows(block, t, b);
}

void sparse_prefill(const SparsePrefillParams& p) {
  const AttentionTensors& t = p.t;
  // Heads that share a list go through the tile together. Blocks of a head follow each other: they share most keys, which stay in cache.
  const int64_t together = p.list_heads == 1 ? t.group() : 1, step = queries_of_block(together);
  const int64_t units = t.heads / together;
  dispatch_float(t.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, t.batch * units * p.blocks, 1, [&](int64_t i) {
      const int64_t block = p.blocks - 1 - i % p.blocks, head = i / p.blocks % units * together, entry = i / p.blocks / units;
      const int64_t end = (block + 1) * p.block < t.q_len ? (block + 1) * p.block : t.q_len;
      for (int64_t first = block * p.block; first < end; first += step)
        for (int64_t h = 0; h < together; h += kMaxRows)
          attend_rows<T>(
              p, BlockRows{entry, first, end - first < step ? end - first : step, head + h, together - h < kMaxRows ? together - h : kMaxRows},
              head / t.group(), walk_of(p, entry, head, block));
    });
  });
}

}  // namespace stretto::STRETTO_ISA
