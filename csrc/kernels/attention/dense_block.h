// What the ops over plain tensors share: sequences, the keys a query sees, and the rows of a block. For *_cpu.cpp only.
#pragma once
#include "common/parallel.h"
#include "kernels/attention/dense_attention.h"
#include "kernels/attention/row_block.h"

namespace stretto::STRETTO_ISA {

struct DenseSequence { int64_t entry, q_begin, q_rows, k_begin, k_rows; };

STRETTO_INLINE DenseSequence dense_sequence(const AttentionTensors& t, const Sequences& s, int64_t i) {
  if (!s.cu_q) return {i, 0, t.q_len, 0, t.k_len};
  const auto within = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  const int64_t q = within(s.cu_q[i], 0, t.q_len), k = within(s.cu_k[i], 0, t.k_len);  // a recorded step may meet other numbers
  return {0, q, within(s.cu_q[i + 1], q, t.q_len) - q, k, within(s.cu_k[i + 1], k, t.k_len) - k};
}

struct KeyRange { int64_t begin, end; };

STRETTO_INLINE KeyRange keys_of(const DenseSequence& s, const Visible& visible, int64_t query) {
  const int64_t position = query + s.k_rows - s.q_rows;
  KeyRange k{0, s.k_rows};
  if (visible.causal && position + 1 < k.end) k.end = position + 1;
  if (visible.window > 0) {
    if (position - visible.window + 1 > k.begin) k.begin = position - visible.window + 1;
    if (position + visible.window < k.end) k.end = position + visible.window;
  }
  if (k.end < k.begin) k.end = k.begin;
  return k;
}

// Queries [first, first + queries) of batch entry `entry`, counted from its first row, for the heads [head, head + heads) of a kv head.
struct BlockRows {
  int64_t entry, first, queries, head, heads;
  int count() const { return static_cast<int>(queries * heads); }
  int64_t query(int r) const { return first + r / heads; }
  int64_t head_of(int r) const { return head + r % heads; }
};

// Row blocks of some queries for all heads of a group, or where these are too many, some heads of one query.
STRETTO_INLINE int64_t queries_of_block(int64_t heads) { return heads >= kMaxRows ? 1 : kMaxRows / heads; }

// The block's scratch is slot 2 of the thread.
template <class T> STRETTO_INLINE char* block_memory(const AttentionTensors& t) {
  return static_cast<char*>(thread_scratch(2, RowBlock<T>::scratch_bytes(t.head_dim)));
}

template <class T> STRETTO_INLINE void begin_rows(RowBlock<T>& block, const AttentionTensors& t, const BlockRows& b) {
  block.begin(b.count());
  for (int r = 0; r < b.count(); ++r) block.set_query(r, static_cast<const T*>(t.q) + t.q_strides.at(b.entry, b.query(r), b.head_of(r)), t.scale);
}

template <class T> STRETTO_INLINE void finish_rows(RowBlock<T>& block, const AttentionTensors& t, const BlockRows& b) {
  for (int r = 0; r < b.count(); ++r)
    block.finish_row(r, static_cast<T*>(t.out) + t.out_strides.at(b.entry, b.query(r), b.head_of(r)),
                     t.lse + (b.entry * t.q_len + b.query(r)) * t.heads + b.head_of(r));
}

// Keys and values base, base + 1, ... of a kv head, and who sees them; queries count from the sequence's first.
template <class T> STRETTO_INLINE void set_keys(RowBlock<T>& block, const AttentionTensors& t, const DenseSequence& s, int64_t kv_head, int64_t base,
                                                int64_t end) {
  block.keys.count = static_cast<int>(end - base < kSplit ? end - base : kSplit);
  const T* key = static_cast<const T*>(t.k) + t.k_strides.at(s.entry, s.k_begin + base, kv_head);
  const T* value = static_cast<const T*>(t.v) + t.v_strides.at(s.entry, s.k_begin + base, kv_head);
  for (int j = 0; j < block.keys.count; ++j) {
    block.keys.key[j] = key + j * t.k_strides.row;
    block.keys.value[j] = value + j * t.v_strides.row;
  }
}
template <class T> STRETTO_INLINE void set_seen(RowBlock<T>& block, const DenseSequence& s, const Visible& visible, const BlockRows& b,
                                                int64_t base) {
  for (int64_t i = 0; i < b.queries; ++i) {
    const KeyRange k = keys_of(s, visible, b.first - s.q_begin + i);
    const SeenKeys seen = seen_range(k.begin - base, k.end - base);
    for (int64_t h = 0; h < b.heads; ++h) block.seen[i * b.heads + h] = seen;
  }
}

// Query blocks of all sequences. Work is an upper bound of the keys seen.
struct DenseTask {
  int64_t work;
  int32_t seq, first;
};

// Returns the number of blocks of `step` queries; tasks may be null. Most keys first: long tasks should not come last.
static inline int64_t list_tasks(const AttentionTensors& t, const Sequences& sequences, const Visible& visible, int64_t step, DenseTask* tasks) {
  int64_t n = 0;
  for (int64_t i = 0; i < sequences.count; ++i) {
    const DenseSequence s = dense_sequence(t, sequences, i);
    for (int64_t first = 0; first < s.q_rows; first += step, ++n) {
      if (!tasks) continue;
      const int64_t last = first + step < s.q_rows ? first + step - 1 : s.q_rows - 1;
      tasks[n] = {keys_of(s, visible, last).end - keys_of(s, visible, first).begin, static_cast<int32_t>(i), static_cast<int32_t>(first)};
    }
  }
  if (!tasks) return n;
  int64_t gap = 1;
  while (gap < n / 3) gap = 3 * gap + 1;
  for (; gap > 0; gap /= 3)  // Shell's sort; equal work stays in no particular, but always the same order
    for (int64_t i = gap; i < n; ++i) {
      const DenseTask task = tasks[i];
      int64_t j = i;
      for (; j >= gap && tasks[j - gap].work < task.work; j -= gap) tasks[j] = tasks[j - gap];
      tasks[j] = task;
    }
  return n;
}

// f(sequence, rows of a block, kv head) for all blocks, in parallel.
template <class F> STRETTO_INLINE void for_dense_blocks(const AttentionTensors& t, const Sequences& sequences, const Visible& visible, const F& f) {
  const int64_t group = t.group(), step = queries_of_block(group), n = list_tasks(t, sequences, visible, step, nullptr);
  if (n == 0) return;
  // Slot 1: blocks use slot 2, and this thread computes some of them.
  DenseTask* tasks = static_cast<DenseTask*>(thread_scratch(1, n * static_cast<int64_t>(sizeof(DenseTask))));
  list_tasks(t, sequences, visible, step, tasks);
  parallel_for(0, n * t.kv_heads, 1, [&](int64_t i) {
    const DenseTask& task = tasks[i / t.kv_heads];
    const int64_t kv_head = i % t.kv_heads;
    const DenseSequence s = dense_sequence(t, sequences, task.seq);
    const int64_t queries = task.first + step < s.q_rows ? step : s.q_rows - task.first;
    for (int64_t h = 0; h < group; h += kMaxRows)
      f(s, BlockRows{s.entry, s.q_begin + task.first, queries, kv_head * group + h, group - h < kMaxRows ? group - h : kMaxRows}, kv_head);
  });
}

}  // namespace stretto::STRETTO_ISA
