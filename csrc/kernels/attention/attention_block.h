// One block of rows against one split of keys: where keys and values are, which rows see which, and the order of the work.
// For *_cpu.cpp only.
#pragma once
#include <new>

#include "common/parallel.h"
#include "kernels/attention/attention_row.h"
#include "kernels/attention/paged_attention.h"

namespace stretto::STRETTO_ISA {

// Rows (query, head of the group) of a block: keys are converted once for all of them. 96 rows of scores take 102 KB of L2.
inline constexpr int kBlockRows = 96;
// From this number of rows on keys and values of a chunk are converted to float once, and not by every tile.
inline constexpr int kConvertRows = 2 * kTileRows + 1;

struct Sequence {
  int64_t first_row, rows;  // in q and out
  int64_t cached, limit;    // positions before these rows; positions there are pages for
  bool tree;
  const uint64_t* mask;  // of its first row; mask_rows are there
  int64_t mask_rows;
};

inline constexpr int kMaxNodes = 256;  // of a tree; mask_words is at most 4

// Queries [first, first + count) of a sequence, all heads of the groups of kv_heads kv heads. part: where its parts are, -1 if it is
// not cut; the parts of a split stand kv head by kv head.
struct Block {
  int32_t seq, kv_head, kv_heads, first, count, split_begin, split_end;
  int64_t part, row;
};

STRETTO_INLINE Sequence sequence_of(const PagedAttentionParams& p, int64_t r) {
  int64_t begin = p.cu_q[r], end = p.cu_q[r + 1];
  begin = begin < 0 ? 0 : begin > p.rows ? p.rows : begin;
  end = end < begin ? begin : end > p.rows ? p.rows : end;
  Sequence s{.first_row = begin,
             .rows = end - begin,
             .cached = p.cached[r] > 0 ? p.cached[r] : 0,
             .limit = p.pages > 0 ? p.table_width * p.page_size : 0,  // below 2^31: checked by the binding
             .tree = false,
             .mask = nullptr,
             .mask_rows = 0};
  const int64_t start = p.mask && p.mask_start ? p.mask_start[r] : -1;
  if (start < 0) return s;
  s.tree = true;
  s.mask_rows = start < p.mask_rows ? p.mask_rows - start : 0;
  s.mask = p.mask + (s.mask_rows ? start * p.mask_words : 0);
  return s;
}

STRETTO_INLINE float* output_row(const PagedAttentionParams& p, const Sequence& s, const Block& b, int64_t kv_head, int64_t row) {
  const int64_t group = p.heads / p.kv_heads;
  return p.out + (s.first_row + b.first + row / group) * p.out_row + (kv_head * group + row % group) * p.head_dim;
}

// Parts of the rows of a block for one split: acc [rows, head_dim], then m and l [rows].
STRETTO_INLINE int64_t part_floats(int64_t rows, int64_t head_dim) { return rows * head_dim + (2 * rows + 15) / 16 * 16; }
STRETTO_INLINE Part part_of(float* parts, int64_t rows, int64_t head_dim, int64_t row) {
  float* m = parts + rows * head_dim;
  return {m[row], m[rows + row], parts + row * head_dim};
}

// What a row sees: positions [begin, shared) in the slots of those positions, then [shared, end), its ancestors in the tree.
struct RowKeys { int32_t begin, shared, end; };
struct TileRows { int32_t first, count; };

// The rows of a block for one kv head.
template <class T> class Worker {
 public:
  Worker(const PagedAttentionParams& params, const Sequence& sequence, const Block& block, int64_t head, char* memory)
      : p(params), seq(sequence), b(block), kv_head(head) {
    group = p.heads / p.kv_heads;
    rows = b.count * group;
    num_tiles = static_cast<int>((rows + kTileRows - 1) / kTileRows);
    convert = rows >= kConvertRows && sizeof(T) != sizeof(float);
    gather = p.page_size % kLanes != 0;
    place_scratch(memory);
    for (int64_t r = 0; r < rows; ++r) keys[r] = row_keys(b.first + r / group);
    pack_queries();
  }

  static int64_t scratch_floats(const PagedAttentionParams& p, int64_t rows) {
    return rows * p.head_dim + 2 * rows * kRowStride + 2 * part_floats(rows, p.head_dim) + kChunk * p.head_dim + 4 * kRowStride;
  }
  static int64_t scratch_bytes(const PagedAttentionParams& p, int64_t rows) {
    const int64_t pointers = kSplit / kLanes + kSplit + 2 * kRowStride;
    return (scratch_floats(p, rows) * 4 + pointers * 8 + 2 * rows * static_cast<int64_t>(sizeof(RowKeys)) + 63) / 64 * 64;
  }

  void begin_block() {
    float* total_m = joined + rows * p.head_dim;
    for (int64_t r = 0; r < rows; ++r) total_m[r] = -__builtin_inff(), total_m[rows + r] = 0.f;
  }
  void join_split() {
    float* total_m = joined + rows * p.head_dim;
    for (int64_t r = 0; r < rows; ++r) {
      Part into = part_of(joined, rows, p.head_dim, r);
      merge(into, part_of(current, rows, p.head_dim, r), p.head_dim);
      total_m[r] = into.m, total_m[rows + r] = into.l;
    }
  }
  void finish_block() {
    for (int64_t r = 0; r < rows; ++r) finish(part_of(joined, rows, p.head_dim, r), p.head_dim, output_row(p, seq, b, kv_head, r));
  }

  // A split is taken in four stages, so that the caller can walk the kv heads of a chunk of keys in the order of memory.
  void begin_split(int32_t split) {
    base = int64_t(split) * kSplit;
    first = kSplit, last = 0;
    ancestors = false;
    for (int64_t r = 0; r < rows; ++r) {
      const RowKeys k = keys[r];
      RowKeys& s = here[r];
      s = {clip(k.begin), clip(k.shared), clip(k.end)};
      if (s.shared < s.begin) s.shared = s.begin;
      if (s.begin < s.shared) first = s.begin < first ? s.begin : first, last = s.shared > last ? s.shared : last;
      ancestors |= s.shared < s.end;
    }
    locate(base, first, last, vector_keys, value_rows_, key_scale, value_scale);
  }

  // Keys [c, c + kChunk) of the split.
  void score_keys(int c) {
    const int begin = c > first ? c : first, end = c + kChunk < last ? c + kChunk : last;
    if (begin >= end) return;
    if (convert || gather) widen_keys(base, begin, end, vector_keys);
    for (int t = 0; t < num_tiles; ++t) {
      const TileRows tr = tile(t);
      int from = end, to = begin;
      for (int r = tr.first; r < tr.first + tr.count; ++r) {
        if (here[r].begin >= here[r].shared) continue;
        from = here[r].begin < from ? here[r].begin : from;
        to = here[r].shared > to ? here[r].shared : to;
      }
      from = from > begin ? from : begin, to = to < end ? to : end;
      if (from < to) score_chunk(t, from, to, vector_keys, scores);
    }
  }

  // Scores become weights; the accumulators of `parts` (the worker's own, if nullptr) become zero.
  void weigh(float* parts) {
    if (p.k_scales) scale_scores();
    if (ancestors) score_ancestors();
    acc = parts ? parts : current;
    float *m = acc + rows * p.head_dim, *l = m + rows;
    for (int64_t r = 0; r < rows; ++r) {
      m[r] = -__builtin_inff(), l[r] = 0.f;
      if (here[r].begin >= here[r].end) continue;
      softmax_row(scores + r * kRowStride, here[r].begin, here[r].end, p.softcap, m + r, l + r);
      for (int64_t i = 0; i < p.head_dim; i += kLanes) store(acc + r * p.head_dim + i, zero());
    }
    if (p.v_scales)
      for (int64_t r = 0; r < rows; ++r)
        for (int j = here[r].begin; j < here[r].shared; ++j) scores[r * kRowStride + j] *= value_scale[j];
  }

  // Values [c, c + kChunk) of the split.
  void add_values(int c) {
    const int begin = c > first ? c : first, end = c + kChunk < last ? c + kChunk : last;
    if (begin >= end) return;
    if (!convert) {
      for (int t = 0; t < num_tiles; ++t) tile_values<T>(t, begin, end, value_rows_, acc);
      return;
    }
    const float* wide[kSplit];
    for (int j = begin; j < end; ++j) {
      float* to = chunk + (j - c) * p.head_dim;
      wide[j] = to;
      for (int64_t i = 0; i < p.head_dim; i += kLanes) store(to + i, load(value_rows_[j] + i));
    }
    for (int t = 0; t < num_tiles; ++t) tile_values<float>(t, begin, end, wide, acc);
  }

  void end_split() {
    if (ancestors) add_ancestors();
  }

 private:
  const PagedAttentionParams& p;
  const Sequence& seq;
  const Block& b;
  int64_t kv_head, group, rows, base = 0;
  int num_tiles, first = 0, last = 0;  // first, last: keys of the split that some row sees
  bool convert, gather, ancestors = false;
  float* acc = nullptr;
  float *queries, *scores, *node_scores, *joined, *current, *chunk, *key_scale, *value_scale, *node_key_scale, *node_value_scale;
  const T** vector_keys;   // [kSplit / 16] where vectors of keys begin, by position in the split
  const T** value_rows_;   // [kSplit]
  const T** node_vectors;  // [17]; nodes stand from offset cached % 16 on
  const T** node_values;   // [kRowStride]
  RowKeys *keys, *here;

  int32_t clip(int32_t position) const {
    const int64_t i = position - base;
    return static_cast<int32_t>(i < 0 ? 0 : i > kSplit ? kSplit : i);
  }

  void place_scratch(char* memory) {
    const int64_t d = p.head_dim, part = part_floats(rows, d);
    float* f = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t n) {
      float* at = f;
      f += n;
      return at;
    };
    queries = take(rows * d), scores = take(rows * kRowStride), node_scores = take(rows * kRowStride);
    joined = take(part), current = take(part), chunk = take(kChunk * d);
    key_scale = take(kRowStride), value_scale = take(kRowStride), node_key_scale = take(kRowStride), node_value_scale = take(kRowStride);
    vector_keys = reinterpret_cast<const T**>(f);
    value_rows_ = vector_keys + kSplit / kLanes;
    node_vectors = value_rows_ + kSplit;
    node_values = node_vectors + kRowStride;
    keys = reinterpret_cast<RowKeys*>(node_values + kRowStride);
    here = keys + rows;
  }

  // Rows are shared out evenly over tiles: 8 rows are 4 + 4, not 6 + 2.
  TileRows tile(int t) const {
    const int64_t each = rows / num_tiles, more = rows % num_tiles;
    return {static_cast<int32_t>(t * each + (t < more ? t : more)), static_cast<int32_t>(each + (t < more))};
  }

  uint64_t mask_word(int64_t query, int64_t word) const {
    if (query >= seq.mask_rows) return 0;
    const int64_t left = query + 1 - word * 64;  // an ancestor comes before its node: bits behind mean nothing
    const uint64_t bits = seq.mask[query * p.mask_words + word];
    return left >= 64 ? bits : left <= 0 ? 0 : bits & ((uint64_t(1) << left) - 1);
  }

  RowKeys row_keys(int64_t query) const {
    int64_t shared = seq.cached + query + 1, end = shared;
    if (seq.tree) {
      int64_t nodes = 0;
      for (int64_t w = 0; w < p.mask_words; ++w) nodes += __builtin_popcountll(mask_word(query, w));
      shared = seq.cached, end = shared + nodes;
      if (seq.cached + seq.rows > seq.limit) end = shared;  // the nodes have no slots
    }
    int64_t begin = p.window > 0 && end > p.window ? end - p.window : 0;
    if (end > seq.limit) end = seq.limit;
    if (shared > end) shared = end;
    if (begin > end) begin = end;
    return {static_cast<int32_t>(begin), static_cast<int32_t>(shared), static_cast<int32_t>(end)};
  }

  // Tile by tile [head_dim][rows of the tile], times the scale.
  void pack_queries() {
    const float* q = p.q + (seq.first_row + b.first) * p.q_row + kv_head * group * p.q_head;
    for (int t = 0; t < num_tiles; ++t) {
      const TileRows tr = tile(t);
      float* to = queries + tr.first * p.head_dim;
      for (int r = 0; r < tr.count; ++r) {
        const int64_t row = tr.first + r;
        const float* from = q + row / group * p.q_row + row % group * p.q_head;
        for (int64_t d = 0; d < p.head_dim; ++d) to[d * tr.count + r] = from[d] * p.scale;
      }
    }
  }

  // Pointers (and scales) of positions origin + [begin, end); origin is a multiple of 16, and so are vectors of keys.
  void locate(int64_t origin, int begin, int end, const T** vectors, const T** values, float* k_scale, float* v_scale) {
    const int32_t* table = p.table + b.seq * p.table_width;
    for (int i = begin; i < end;) {
      const int64_t position = origin + i, offset = position % p.page_size;
      int64_t page = table[position / p.page_size];
      page = page < 0 ? 0 : page >= p.pages ? p.pages - 1 : page;
      const int64_t head = kv_head * p.page_size, left = p.page_size - offset;
      const int stop = left < end - i ? static_cast<int>(i + left) : end;
      const T* key = static_cast<const T*>(p.k_pages) + page * p.k_page + head * p.head_dim + offset;
      const T* value = static_cast<const T*>(p.v_pages) + page * p.v_page + (head + offset) * p.head_dim;
      if (!gather)
        for (int j = i & ~(kLanes - 1); j < stop; j += kLanes) vectors[j / kLanes] = key + (j - i);
      for (int j = i; j < stop; ++j) values[j] = value + (j - i) * p.head_dim;
      if (p.k_scales) {
        const float* ks = p.k_scales + page * p.k_scale_page + head + offset;
        const float* vs = p.v_scales + page * p.v_scale_page + head + offset;
        for (int j = i; j < stop; ++j) k_scale[j] = ks[j - i], v_scale[j] = vs[j - i];
      }
      i = stop;
    }
  }

  // Keys of positions origin + [first, last), at most kChunk from a multiple of kChunk on, as floats [head_dim][kChunk].
  void widen_keys(int64_t origin, int first, int last, const T* const* vectors) {
    const int start = first & ~(kChunk - 1);
    if (!gather) {
      for (int j = first & ~(kLanes - 1); j < last; j += kLanes) {
        const T* from = vectors[j / kLanes];
        float* to = chunk + (j - start);
        for (int64_t d = 0; d < p.head_dim; ++d, from += p.page_size, to += kChunk) store(to, load(from));
      }
      return;
    }
    const int32_t* table = p.table + b.seq * p.table_width;
    for (int64_t i = 0; i < kChunk * p.head_dim; i += kLanes) store(chunk + i, zero());
    for (int i = first; i < last;) {
      const int64_t position = origin + i, offset = position % p.page_size;
      int64_t page = table[position / p.page_size];
      page = page < 0 ? 0 : page >= p.pages ? p.pages - 1 : page;
      const T* from = static_cast<const T*>(p.k_pages) + page * p.k_page + kv_head * p.page_size * p.head_dim + offset;
      const int64_t left = p.page_size - offset;
      const int stop = left < last - i ? static_cast<int>(i + left) : last;
      for (int64_t d = 0; d < p.head_dim; ++d, from += p.page_size)
        for (int j = i; j < stop; ++j) chunk[d * kChunk + j - start] = to_float(from[j - i]);
      i = stop;
    }
  }

  // Scores of one tile against keys [first, last) within one chunk.
  void score_chunk(int t, int first, int last, const T* const* vectors, float* out) {
    const TileRows tr = tile(t);
    const float* q = queries + tr.first * p.head_dim;
    const int v = first / kLanes, count = (last + kLanes - 1) / kLanes - v;
    out += tr.first * kRowStride + v * kLanes;
    if (!convert && !gather) return score_tile<T>(tr.count, q, vectors + v, p.page_size, p.head_dim, count, out);
    const float* wide[kChunk / kLanes];
    for (int i = 0; i < count; ++i) wide[i] = chunk + (v * kLanes & (kChunk - 1)) + i * kLanes;
    score_tile<float>(tr.count, q, wide, kChunk, p.head_dim, count, out);
  }

  void scale_scores() {
    for (int64_t r = 0; r < rows; ++r)
      for (int j = here[r].begin & ~(kLanes - 1); j < here[r].shared; j += kLanes) {
        float* s = scores + r * kRowStride + j;
        store(s, mul(load(s), load(key_scale + j)));
      }
  }

  // Scores against all nodes up to the block's last, then each row's ancestors to their positions behind its prefix.
  void score_ancestors() {
    const int nodes = b.first + b.count < kMaxNodes ? b.first + b.count : kMaxNodes;
    const int offset = static_cast<int>(seq.cached % kLanes), last = offset + nodes;
    const int64_t origin = seq.cached - offset;
    locate(origin, offset, last, node_vectors, node_values, node_key_scale, node_value_scale);
    for (int c = 0; c < last; c += kChunk) {
      const int begin = c > offset ? c : offset, end = c + kChunk < last ? c + kChunk : last;
      if (begin >= end) continue;
      if (convert || gather) widen_keys(origin, begin, end, node_vectors);
      for (int t = 0; t < num_tiles; ++t) score_chunk(t, begin, end, node_vectors, node_scores);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = node_scores + r * kRowStride + offset;
      float* to = scores + r * kRowStride;
      for_ancestors(r, [&](int position, int node) { to[position] = p.k_scales ? from[node] * node_key_scale[offset + node] : from[node]; });
    }
  }

  // f(position in the split, node) for the row's ancestors whose positions lie in this split, in order.
  template <class F> void for_ancestors(int64_t r, const F& f) {
    if (here[r].shared >= here[r].end) return;
    int64_t position = seq.cached - base;
    for (int64_t w = 0; w < p.mask_words; ++w)
      for (uint64_t bits = mask_word(b.first + r / group, w); bits; bits &= bits - 1, ++position)
        if (position >= here[r].shared && position < here[r].end) f(static_cast<int>(position), static_cast<int>(w * 64 + __builtin_ctzll(bits)));
  }

  // Keys that all rows of the tile see go through the tile together; what only some see before and behind, row by row.
  template <class V> void tile_values(int t, int begin, int end, const V* const* values, float* to_acc) {
    const TileRows tr = tile(t);
    int from = 0, to = kSplit;
    for (int r = tr.first; r < tr.first + tr.count; ++r) {
      from = here[r].begin > from ? here[r].begin : from;
      to = here[r].shared < to ? here[r].shared : to;
    }
    if (to < from) to = from;
    const auto row = [&](int r, int low, int high) {
      low = low > here[r].begin ? low : here[r].begin, high = high < here[r].shared ? high : here[r].shared;
      value_tile<V>(1, scores + r * kRowStride, values, low, high, p.head_dim, to_acc + r * p.head_dim);
    };
    for (int r = tr.first; r < tr.first + tr.count; ++r) row(r, begin, end < from ? end : from);
    value_tile<V>(tr.count, scores + tr.first * kRowStride, values, begin > from ? begin : from, end < to ? end : to, p.head_dim,
                  to_acc + tr.first * p.head_dim);
    for (int r = tr.first; r < tr.first + tr.count; ++r) row(r, begin > to ? begin : to, end);
  }

  void add_ancestors() {
    const int offset = static_cast<int>(seq.cached % kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      float* weights = scores + r * kRowStride;
      for_ancestors(r, [&](int position, int node) {
        if (p.v_scales) weights[position] *= node_value_scale[offset + node];
        value_rows_[position] = node_values[offset + node];
      });
      value_tile<T>(1, weights, value_rows_, here[r].shared, here[r].end, p.head_dim, acc + r * p.head_dim);
    }
  }
};

// All kv heads of a block. A chunk of keys (then of values) is read for all of them before the next one is: with pages of
// kChunk rows that is one run of memory, and reading in runs of 24 KB and more is twice as fast as hopping between heads.
template <class T> class BlockWorker {
 public:
  BlockWorker(const PagedAttentionParams& p, const Sequence& seq, const Block& b)
      : block(b), rows(b.count * (p.heads / p.kv_heads)), dim(p.head_dim) {
    const int64_t bytes = Worker<T>::scratch_bytes(p, rows), table = (b.kv_heads * static_cast<int64_t>(sizeof(Worker<T>)) + 63) / 64 * 64;
    char* memory = static_cast<char*>(thread_scratch(2, table + b.kv_heads * bytes));
    workers = reinterpret_cast<Worker<T>*>(memory);
    for (int64_t h = 0; h < b.kv_heads; ++h) new (workers + h) Worker<T>(p, seq, b, b.kv_head + h, memory + table + h * bytes);
  }

  // All splits in order, joined, written out.
  void whole_block() {
    each([](Worker<T>& w, int64_t) { w.begin_block(); });
    for (int32_t split = block.split_begin; split < block.split_end; ++split) {
      one_split(split, nullptr);
      each([](Worker<T>& w, int64_t) { w.join_split(); });
    }
    each([](Worker<T>& w, int64_t) { w.finish_block(); });
  }

  void one_split(int32_t split, float* parts) {
    each([&](Worker<T>& w, int64_t) { w.begin_split(split); });
    for (int c = 0; c < kSplit; c += kChunk) each([&](Worker<T>& w, int64_t) { w.score_keys(c); });
    each([&](Worker<T>& w, int64_t h) { w.weigh(parts ? parts + h * part_floats(rows, dim) : nullptr); });
    for (int c = 0; c < kSplit; c += kChunk) each([&](Worker<T>& w, int64_t) { w.add_values(c); });
    each([](Worker<T>& w, int64_t) { w.end_split(); });
  }

 private:
  const Block& block;
  int64_t rows, dim;
  Worker<T>* workers;  // in the thread's scratch, as all they hold

  template <class F> void each(const F& f) {
    for (int64_t h = 0; h < block.kv_heads; ++h) f(workers[h], h);
  }
};

}  // namespace stretto::STRETTO_ISA
