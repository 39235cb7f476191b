#include "kernels/attention/paged_attention.h"

#include "common/parallel.h"
#include "kernels/attention/attention_block.h"

namespace stretto::STRETTO_ISA {

constexpr int64_t kMaxHeadsTogether = 64;  // bounds the scratch of a task

// Blocks of rows, and the tasks made of them: a block whose work is a large share of the whole is cut into its splits, whose parts
// are joined afterwards; any other block joins its splits as it goes. Both do the same arithmetic.
struct Plan {
  Block* blocks;
  int32_t *task_block, *task_split;  // split -1: the whole block
  float* parts;
  int64_t num_blocks, num_tasks, part_floats, split_rows;
};

STRETTO_INLINE int64_t block_queries(const PagedAttentionParams& p) {
  const int64_t group = p.heads / p.kv_heads;
  return group >= kBlockRows ? 1 : kBlockRows / group;
}

// Few rows against many keys: reading those is the work. Such a sequence keeps its kv heads together, as memory has them.
STRETTO_INLINE bool heads_together(const PagedAttentionParams& p, const Sequence& s) {
  const int64_t keys = s.cached + s.rows < s.limit ? s.cached + s.rows : s.limit;
  const int64_t seen = p.window > 0 && p.window + s.rows < keys ? p.window + s.rows : keys;
  return s.rows * (p.heads / p.kv_heads) < kConvertRows && p.kv_heads <= kMaxHeadsTogether && seen >= 2 * kSplit * num_threads();
}

// Blocks of sequence r of a checked range of rows, last rows first: they see most keys, and long tasks should not come last.
static int64_t add_blocks(const PagedAttentionParams& p, int64_t seq, Block* blocks) {
  const Sequence s = sequence_of(p, seq);
  const int64_t queries = block_queries(p), heads = heads_together(p, s) ? p.kv_heads : 1;
  int64_t n = 0;
  for (int64_t first = (s.rows - 1) / queries * queries; first >= 0 && s.rows > 0; first -= queries) {
    const int64_t count = s.rows - first < queries ? s.rows - first : queries;
    int64_t end = s.cached + first + count;  // of a tree: its depth is at most its index
    if (end > s.limit) end = s.limit;
    int64_t begin = 0;
    if (p.window > 0) {
      const int64_t lowest = s.tree ? s.cached : s.cached + first;
      begin = lowest + 1 - p.window > 0 ? (lowest + 1 - p.window) / kSplit : 0;
    }
    const int64_t splits = (end + kSplit - 1) / kSplit;
    for (int64_t h = 0; h < p.kv_heads; h += heads, ++n) {
      if (!blocks) continue;
      blocks[n] = {.seq = static_cast<int32_t>(seq),
                   .kv_head = static_cast<int32_t>(h),
                   .kv_heads = static_cast<int32_t>(heads),
                   .first = static_cast<int32_t>(first),
                   .count = static_cast<int32_t>(count),
                   .split_begin = static_cast<int32_t>(begin < splits ? begin : splits),
                   .split_end = static_cast<int32_t>(splits),
                   .part = -1,
                   .row = {}};
    }
  }
  return n;
}

static void make_tasks(const PagedAttentionParams& p, Plan& plan) {
  const int64_t group = p.heads / p.kv_heads, threads = num_threads();
  // Work of a block: its multiply-adds, and reading the keys, which costs about as much as four rows.
  const auto work = [&](const Block& b) { return (b.count * group + 4) * b.kv_heads * (b.split_end - b.split_begin); };
  int64_t total = 0;
  for (int64_t i = 0; i < plan.num_blocks; ++i) total += work(plan.blocks[i]);
  plan.num_tasks = plan.part_floats = plan.split_rows = 0;
  for (int64_t i = 0; i < plan.num_blocks; ++i) {
    Block& b = plan.blocks[i];
    const int64_t splits = b.split_end - b.split_begin, rows = b.count * group;  // of one kv head
    if (threads > 1 && splits > 1 && work(b) * 2 * threads > total) {
      b.part = plan.part_floats;
      b.row = plan.split_rows;
      plan.part_floats += splits * b.kv_heads * part_floats(rows, p.head_dim);
      plan.split_rows += b.kv_heads * rows;
      plan.num_tasks += splits;
    } else {
      plan.num_tasks += 1;
    }
  }
}

static void fill_tasks(Plan& plan) {
  int64_t n = 0;
  for (int64_t i = 0; i < plan.num_blocks; ++i) {
    const Block& b = plan.blocks[i];
    if (b.part < 0) {
      plan.task_block[n] = static_cast<int32_t>(i), plan.task_split[n++] = -1;
      continue;
    }
    for (int32_t s = b.split_begin; s < b.split_end; ++s) plan.task_block[n] = static_cast<int32_t>(i), plan.task_split[n++] = s;
  }
}

// Row `row` of all cut blocks: joins its splits and writes the output.
static void join_row(const PagedAttentionParams& p, const Plan& plan, int64_t row) {
  const int64_t group = p.heads / p.kv_heads;
  int64_t i = 0;
  while (plan.blocks[i].part < 0 || row >= plan.blocks[i].row + plan.blocks[i].count * group * plan.blocks[i].kv_heads) ++i;
  const Block& b = plan.blocks[i];
  const int64_t rows = b.count * group, head = (row - b.row) / rows, local = (row - b.row) % rows, floats = part_floats(rows, p.head_dim);
  float* parts = plan.parts + b.part + head * floats;
  Part joined = part_of(parts, rows, p.head_dim, local);
  for (int64_t s = 1; s < b.split_end - b.split_begin; ++s)
    merge(joined, part_of(parts + s * b.kv_heads * floats, rows, p.head_dim, local), p.head_dim);
  finish(joined, p.head_dim, output_row(p, sequence_of(p, b.seq), b, b.kv_head + head, local));
}

template <class T> static void attend(const PagedAttentionParams& p, const Plan& plan) {
  parallel_for(0, plan.num_tasks, 1, [&](int64_t task) {
    const Block& b = plan.blocks[plan.task_block[task]];
    const Sequence s = sequence_of(p, b.seq);
    BlockWorker<T> worker(p, s, b);
    const int32_t split = plan.task_split[task];
    if (split < 0) return worker.whole_block();
    const int64_t rows = b.count * (p.heads / p.kv_heads);
    worker.one_split(split, plan.parts + b.part + (split - b.split_begin) * b.kv_heads * part_floats(rows, p.head_dim));
  });
}

void paged_attention(const PagedAttentionParams& p) {
  const int64_t seqs = p.num_seqs && *p.num_seqs < p.seqs ? *p.num_seqs : p.seqs;
  Plan plan{};
  for (int64_t r = 0; r < seqs; ++r) plan.num_blocks += add_blocks(p, r, nullptr);
  if (plan.num_blocks == 0) return;
  plan.blocks = static_cast<Block*>(thread_scratch(0, plan.num_blocks * static_cast<int64_t>(sizeof(Block))));
  for (int64_t r = 0, n = 0; r < seqs; ++r) n += add_blocks(p, r, plan.blocks + n);
  make_tasks(p, plan);
  // Slot 1: task list and parts. Workers use slot 2: this thread is one of them.
  const int64_t list_bytes = (plan.num_tasks * 8 + 63) / 64 * 64;
  char* memory = static_cast<char*>(thread_scratch(1, list_bytes + plan.part_floats * 4));
  plan.task_block = reinterpret_cast<int32_t*>(memory);
  plan.task_split = plan.task_block + plan.num_tasks;
  plan.parts = reinterpret_cast<float*>(memory + list_bytes);
  fill_tasks(plan);
  if (p.dtype == DType::i8) attend<int8_t>(p, plan);
  else dispatch_float(p.dtype, [&](auto tag) { attend<typename decltype(tag)::type>(p, plan); });
  constexpr int64_t kJoinGrain = 4;  // rows a task: each reads (splits * head_dim) floats that are in L2 already
  parallel_for(0, plan.split_rows, kJoinGrain, [&](int64_t row) { join_row(p, plan, row); });
}

}  // namespace stretto::STRETTO_ISA
