#include "kernels/attention/dense_attention.h"

#include "common/parallel.h"
#include "kernels/attention/row_block.h"

namespace stretto::STRETTO_ISA {

struct DenseTask {
  int64_t keys;  // an upper bound of those seen: the work
  int32_t seq, first;
};
struct DenseSequence { int64_t q_begin, q_rows, k_begin, k_rows, entry; };

static DenseSequence dense_sequence(const DenseAttentionParams& p, int64_t s) {
  if (!p.cu_q) return {0, p.q_len, 0, p.k_len, s};
  return {p.cu_q[s], p.cu_q[s + 1] - p.cu_q[s], p.cu_k[s], p.cu_k[s + 1] - p.cu_k[s], 0};
}

struct KeyRange { int64_t begin, end; };

static KeyRange keys_of(const DenseAttentionParams& p, const DenseSequence& s, int64_t query) {
  const int64_t position = query + s.k_rows - s.q_rows;
  KeyRange k{0, s.k_rows};
  if (p.causal && position + 1 < k.end) k.end = position + 1;
  if (p.window > 0) {
    if (position - p.window + 1 > k.begin) k.begin = position - p.window + 1;
    if (position + p.window < k.end) k.end = position + p.window;
  }
  if (k.end < k.begin) k.end = k.begin;
  return k;
}

static int64_t queries_of_block(const DenseAttentionParams& p) {
  const int64_t group = p.heads / p.kv_heads;
  return group >= kMaxRows ? 1 : kMaxRows / group;
}

// Query blocks of all sequences, most keys first: long tasks should not come last. Returns their number; tasks may be null.
static int64_t list_tasks(const DenseAttentionParams& p, DenseTask* tasks) {
  const int64_t step = queries_of_block(p);
  int64_t n = 0;
  for (int64_t i = 0; i < p.seqs; ++i) {
    const DenseSequence s = dense_sequence(p, i);
    for (int64_t first = 0; first < s.q_rows; first += step, ++n) {
      if (!tasks) continue;
      const int64_t last = first + step < s.q_rows ? first + step - 1 : s.q_rows - 1;
      tasks[n] = {keys_of(p, s, last).end - keys_of(p, s, first).begin, static_cast<int32_t>(i), static_cast<int32_t>(first)};
    }
  }
  if (!tasks) return n;
  int64_t gap = 1;
  while (gap < n / 3) gap = 3 * gap + 1;
  for (; gap > 0; gap /= 3)  // Shell's sort
    for (int64_t i = gap; i < n; ++i) {
      const DenseTask t = tasks[i];
      int64_t j = i;
      for (; j >= gap && tasks[j - gap].keys < t.keys; j -= gap) tasks[j] = tasks[j - gap];
      tasks[j] = t;
    }
  return n;
}

// A task's queries for the heads [head, head + heads) of one kv head.
template <class T> static void attend_block(const DenseAttentionParams& p, const DenseTask& task, int64_t kv_head, int64_t head, int64_t heads) {
  const DenseSequence s = dense_sequence(p, task.seq);
  const int64_t step = queries_of_block(p), queries = task.first + step < s.q_rows ? step : s.q_rows - task.first;
  const int rows = static_cast<int>(queries * heads);
  RowBlock<T> block(p.head_dim, p.softcap, false, static_cast<char*>(thread_scratch(2, RowBlock<T>::scratch_bytes(p.head_dim))));
  block.begin(rows);
  const auto q_row = [&](int r) { return s.q_begin + task.first + r / heads; };
  for (int r = 0; r < rows; ++r)
    block.set_query(r, static_cast<const T*>(p.q) + s.entry * p.q_strides.batch + q_row(r) * p.q_strides.row + (head + r % heads) * p.q_strides.head,
                    p.scale);
  const T* keys = static_cast<const T*>(p.k) + s.entry * p.k_strides.batch + s.k_begin * p.k_strides.row + kv_head * p.k_strides.head;
  const T* values = static_cast<const T*>(p.v) + s.entry * p.v_strides.batch + s.k_begin * p.v_strides.row + kv_head * p.v_strides.head;
  const int64_t begin = keys_of(p, s, task.first).begin, end = keys_of(p, s, task.first + queries - 1).end;
  for (int64_t base = begin / kSplit * kSplit; base < end; base += kSplit) {
    block.keys.count = static_cast<int>(end - base < kSplit ? end - base : kSplit);
    for (int j = 0; j < block.keys.count; ++j) {
      block.keys.key[j] = keys + (base + j) * p.k_strides.row;
      block.keys.value[j] = values + (base + j) * p.v_strides.row;
    }
    for (int64_t i = 0; i < queries; ++i) {
      const KeyRange k = keys_of(p, s, task.first + i);
      const SeenKeys seen = seen_range(k.begin - base, k.end - base);
      for (int64_t h = 0; h < heads; ++h) block.seen[i * heads + h] = seen;
    }
    block.join_split();
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t h = head + r % heads;
    block.finish_row(r, static_cast<T*>(p.out) + s.entry * p.out_strides.batch + q_row(r) * p.out_strides.row + h * p.out_strides.head,
                     p.lse + (s.entry * p.q_len + q_row(r)) * p.heads + h);
  }
}

void dense_attention(const DenseAttentionParams& p) {
  const int64_t n = list_tasks(p, nullptr), group = p.heads / p.kv_heads;
  if (n == 0) return;
  // Slot 1: workers use slot 2, and this thread is one of them.
  DenseTask* tasks = static_cast<DenseTask*>(thread_scratch(1, n * static_cast<int64_t>(sizeof(DenseTask))));
  list_tasks(p, tasks);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, n * p.kv_heads, 1, [&](int64_t i) {
      const DenseTask& task = tasks[i / p.kv_heads];
      const int64_t kv_head = i % p.kv_heads;
      for (int64_t h = 0; h < group; h += kMaxRows)  // more heads than a block has rows: some at a time
        attend_block<T>(p, task, kv_head, kv_head * group + h, group - h < kMaxRows ? group - h : kMaxRows);
    });
  });
}

}  // namespace stretto::STRETTO_ISA
