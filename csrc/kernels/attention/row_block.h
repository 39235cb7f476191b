// The tile of attention over plain tensors: up to kBlockRows query rows that share keys, against keys and values named by the addresses
// of their rows, 256 (a split) at a time. Which rows see which keys of a split is a bit each. Dense, sparse, 3D and temporal attention
// differ only in the addresses and bits they write here; the arithmetic, and so the bits of a row, are those of paged attention.
//
// A row's result depends on its query and on the keys it sees with their places in the splits. Keys that only its neighbours see
// enter its sums with weight zero; where such a value is no number, the rows are taken one by one instead.
// For *_cpu.cpp only.
#pragma once
#include "common/transpose.h"
#include "kernels/attention/attention_row.h"

namespace stretto::STRETTO_ISA {

inline constexpr int kMaxRows = 96;               // of a block: 102 KB of scores, and a key is turned into a column once for all of them
inline constexpr int kWords = kSplit / kChunk;    // of bits, kChunk (64) keys each
inline constexpr int kVectors = kChunk / kLanes;  // of keys in a chunk

struct SeenKeys { uint64_t word[kWords]; };

// Keys [begin, end) of a split.
STRETTO_INLINE SeenKeys seen_range(int64_t begin, int64_t end) {
  SeenKeys s;
  for (int w = 0; w < kWords; ++w) {
    const int64_t low = begin - w * kChunk, high = end - w * kChunk;
    const uint64_t below_high = high >= kChunk ? ~uint64_t(0) : high <= 0 ? 0 : (uint64_t(1) << high) - 1;
    s.word[w] = low <= 0 ? below_high : low >= kChunk ? 0 : below_high & ~((uint64_t(1) << low) - 1);
  }
  return s;
}

// x rotated in place: cosines of the dim / 2 pairs (2 i, 2 i + 1), then sines. See ops.rope.table.
STRETTO_INLINE void rotate_row(float* x, const float* rotation, int64_t dim) {
  const float *cosine = rotation, *sine = rotation + dim / 2;
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i];
    x[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

// Rows of the keys and values of one split, written by the caller. rotation: of the keys' rows, read where the block rotates.
template <class T> struct KeyRows {
  int count = 0;
  const T *key[kSplit], *value[kSplit];
  const float* rotation[kSplit];
};

template <class T> class RowBlock {
 public:
  KeyRows<T> keys;
  SeenKeys seen[kMaxRows];  // of the split that comes next, by row

  static int64_t scratch_bytes(int64_t head_dim) {
    const int64_t d = padded(head_dim);
    return 4 * (kMaxRows * d + kMaxRows * kRowStride + 2 * kMaxRows * (d + 2) + kChunk * d + kLanes * d);
  }

  // tile_rows: rows that go through the registers together, 1 to kTileRows. value_dim may differ from head_dim.
  RowBlock(int64_t head_dim, float softcap_, bool rotates_, char* memory, int tile_rows_ = kTileRows)
      : dim(head_dim), wide(padded(head_dim)), softcap(softcap_), rotates(rotates_), tile_rows(tile_rows_) {
    float* f = reinterpret_cast<float*>(memory);
    const auto take = [&](int64_t n) {
      float* at = f;
      f += n;
      return at;
    };
    queries = take(kMaxRows * wide), scores = take(kMaxRows * kRowStride);
    joined = take(kMaxRows * wide), current = take(kMaxRows * wide);
    joined_ml = take(2 * kMaxRows), current_ml = take(2 * kMaxRows);
    chunk = take(kChunk * wide), row_buffer = take(kLanes * wide);
    widen = sizeof(T) != sizeof(float) || wide != dim;
  }

  void begin(int count) {
    rows = count;
    num_tiles = (rows + tile_rows - 1) / tile_rows;
    for (int r = 0; r < rows; ++r) joined_ml[2 * r] = -__builtin_inff(), joined_ml[2 * r + 1] = 0.f;
  }

  // Row r's query, times the scale, into its tile [head_dim][rows of the tile].
  void set_query(int r, const T* q, float scale, const float* rotation = nullptr) {
    widen_row(q, row_buffer);
    if (rotates) rotate_row(row_buffer, rotation, dim);
    int t = r / (rows / num_tiles + 1);  // a lower bound: tiles are at most that long
    while (r >= tile_begin(t + 1)) ++t;
    const int first = tile_begin(t), count = tile_begin(t + 1) - first;
    float* to = queries + first * dim + (r - first);
    for (int64_t d = 0; d < dim; ++d) to[d * count] = row_buffer[d] * scale;
  }

  // Joins one split, described by `keys` and `seen`, to what came before.
  void join_split() {
    score_split();
    weigh_split();
    for (int c = 0; c < keys.count; c += kChunk) add_values(c / kChunk);
    for (int r = 0; r < rows; ++r) {
      Part into = part(joined, joined_ml, r);
      merge(into, part(current, current_ml, r), wide);
      joined_ml[2 * r] = into.m, joined_ml[2 * r + 1] = into.l;
    }
  }

  // The first stage alone: scores of a split, before softcap and softmax; row r's stand at score_row(r), unseen ones are undefined.
  void score_split() {
    for (int i = keys.count; i % kLanes; ++i) {  // whole vectors: what stands behind the end is masked
      keys.key[i] = keys.key[keys.count - 1];
      if (rotates) keys.rotation[i] = keys.rotation[keys.count - 1];
    }
    compare_rows();
    for (int c = 0; c < keys.count; c += kChunk) score_chunk(c / kChunk);
  }
  // After join_split: the weights e^(score - split_max) of the keys that the row sees.
  float* score_row(int r) { return scores + r * kRowStride; }
  float split_max(int r) const { return current_ml[2 * r]; }

  // Sums of values by weights that the caller writes to score_row, instead of queries and keys. Only values of `seen` keys are read.
  void begin_sums(int count) {
    begin(count);
    for (int64_t i = 0; i < rows * wide; i += kLanes) store(current + i, zero());
  }
  void add_split() {
    compare_rows();
    for (int c = 0; c < keys.count; c += kChunk) add_values(c / kChunk);
  }
  void finish_sums(int r, T* out) const { narrow_row(current + r * wide, out); }

  // Scores of row r become weights e^(score - m) and zeros; m and their sum are returned. Lanes no row of its tile sees are undefined.
  void weigh_row(int r, int t, float* m_out, float* l_out) {
    float* s = score_row(r);
    f32x16 largest = broadcast(-__builtin_inff());
    for (int j = 0; j < keys.count; j += kLanes) {
      const uint32_t bits = lanes_of(seen[r], j);
      if (!bits) continue;
      f32x16 x = capped(load(s + j));
      if (bits != 0xffff) x = select(bits, x, broadcast(-__builtin_inff()));
      store(s + j, x);
      largest = max(x, largest);  // a NaN is passed over here, and met below
    }
    const float m = reduce_max(largest);
    const f32x16 shift = broadcast(m);
    f32x16 sum = zero();
    for (int j = 0; j < keys.count; j += kLanes) {
      const uint32_t bits = lanes_of(seen[r], j);
      if (!bits) {
        if (lanes_of(tile_seen[t], j)) store(s + j, zero());
        continue;
      }
      const f32x16 w = exp(sub(load(s + j), shift));
      store(s + j, w);
      sum = add(sum, w);
    }
    *m_out = m;
    *l_out = reduce_add(sum);
  }

  // Writes row r: head_dim elements, and the log of its sum of exponentials where it is wanted. No keys: zeros and -inf.
  void finish_row(int r, T* out, float* lse) {
    const Part p = part(joined, joined_ml, r);
    finish(p, wide, row_buffer);
    narrow_row(row_buffer, out);
    if (lse) *lse = p.l == 0.f ? -__builtin_inff() : p.m + __builtin_logf(p.l);
  }

  f32x16 capped(f32x16 x) const {  // softcap * tanh(x / softcap); tanh x = 1 - 2 / (e^2x + 1)
    if (softcap <= 0.f) return x;
    const f32x16 one = broadcast(1.f), two = broadcast(2.f);
    return mul(broadcast(softcap), sub(one, div(two, add(exp(mul(x, broadcast(2.f / softcap))), one))));
  }

  // Bits of the sixteen keys from j, a multiple of 16, on.
  static uint32_t lanes_of(const SeenKeys& s, int j) { return static_cast<uint32_t>(s.word[j / kChunk] >> (j % kChunk)) & 0xffff; }
  // Rows are shared out evenly over tiles: 8 rows are 4 + 4, not 6 + 2.
  int tile_begin(int t) const {
    const int each = rows / num_tiles, more = rows % num_tiles;
    return t * each + (t < more ? t : more);
  }

 private:
  int64_t dim, wide;  // wide: head_dim in whole vectors
  float softcap;
  bool rotates, widen = false;
  int tile_rows, rows = 0, num_tiles = 1;
  float *queries, *scores, *joined, *current, *joined_ml, *current_ml, *chunk, *row_buffer;
  SeenKeys tile_seen[kMaxRows], same[kMaxRows];  // by tile: keys some row sees, and keys of which all rows think alike

  static int64_t padded(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  Part part(float* acc, float* ml, int r) const { return {ml[2 * r], ml[2 * r + 1], acc + r * wide}; }

  void widen_row(const T* from, float* to) const {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(to + i, load(from + i));
    if (i < dim) store(to + i, load_some(from + i, static_cast<int>(dim - i)));
  }

  void narrow_row(const float* from, T* to) const {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(to + i, load(from + i));
    if (i < dim) store_some(to + i, load(from + i), static_cast<int>(dim - i));
  }

  // Sixteen keys as columns [head_dim][kChunk] of the chunk.
  void pack_keys(int j) {
    float* to = chunk + j % kChunk;
    if (!rotates) return transpose_rows(keys.key + j, dim, to, kChunk);
    const float* rotated[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      float* row = row_buffer + i * wide;
      widen_row(keys.key[j + i], row);
      rotate_row(row, keys.rotation[j + i], dim);
      rotated[i] = row;
    }
    transpose_rows(rotated, dim, to, kChunk);
  }

  void score_chunk(int w) {
    uint64_t any = 0;
    for (int t = 0; t < num_tiles; ++t) any |= tile_seen[t].word[w];
    const float* columns[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = chunk + v * kLanes;
      if (any >> (v * kLanes) & 0xffff) pack_keys(w * kChunk + v * kLanes);
    }
    for (int t = 0; t < num_tiles; ++t) {
      const uint64_t bits = tile_seen[t].word[w];
      const int first = tile_begin(t), count = tile_begin(t + 1) - first;
      for (int v = 0; v < kVectors;) {
        int end = v;
        while (end < kVectors && (bits >> (end * kLanes) & 0xffff)) ++end;
        if (end == v) {
          ++v;
          continue;
        }
        score_tile<float>(count, queries + first * dim, columns + v, kChunk, dim, end - v, scores + first * kRowStride + w * kChunk + v * kLanes);
        v = end;
      }
    }
  }

  void compare_rows() {
    for (int t = 0; t < num_tiles; ++t) {
      tile_seen[t] = seen[tile_begin(t)];
      same[t] = SeenKeys{{~uint64_t(0), ~uint64_t(0), ~uint64_t(0), ~uint64_t(0)}};
      for (int r = tile_begin(t) + 1; r < tile_begin(t + 1); ++r)
        for (int w = 0; w < kWords; ++w) tile_seen[t].word[w] |= seen[r].word[w];
      for (int r = tile_begin(t); r < tile_begin(t + 1); ++r)
        for (int w = 0; w < kWords; ++w) same[t].word[w] &= ~(seen[r].word[w] ^ tile_seen[t].word[w]);
    }
  }

  void weigh_split() {
    for (int t = 0; t < num_tiles; ++t)
      for (int r = tile_begin(t); r < tile_begin(t + 1); ++r) {
        uint64_t any = 0;
        for (int w = 0; w < kWords; ++w) any |= seen[r].word[w];
        if (any) weigh_row(r, t, current_ml + 2 * r, current_ml + 2 * r + 1);
        else current_ml[2 * r] = -__builtin_inff(), current_ml[2 * r + 1] = 0.f, clear_weights(r, t);
        for (int64_t i = 0; i < wide; i += kLanes) store(current + r * wide + i, zero());
      }
  }
  void clear_weights(int r, int t) {
    for (int j = 0; j < keys.count; j += kLanes)
      if (lanes_of(tile_seen[t], j)) store(score_row(r) + j, zero());
  }

  bool all_finite(const float* const* values, int w, uint64_t bits) const {
    f32x16 sum = zero();
    for (; bits; bits &= bits - 1) {
      const float* value = values[w * kChunk + __builtin_ctzll(bits)];
      for (int64_t i = 0; i < wide; i += kLanes) {
        const f32x16 x = load(value + i);
        sum = add(sum, sub(x, x));  // infinity and NaN become NaN
      }
    }
    return mask_ge(sum, zero()) == 0xffff;
  }

  void add_values(int w) {
    uint64_t any = 0;
    for (int t = 0; t < num_tiles; ++t) any |= tile_seen[t].word[w];
    if (!any) return;
    const float* widened[kSplit];
    const float* const* values = widened;
    if (widen) {
      for (uint64_t bits = any; bits; bits &= bits - 1) {
        const int i = __builtin_ctzll(bits);
        widened[w * kChunk + i] = chunk + i * wide;
        widen_row(keys.value[w * kChunk + i], chunk + i * wide);
      }
    } else {
      values = reinterpret_cast<const float* const*>(keys.value);
    }
    for (int t = 0; t < num_tiles; ++t) {
      const int first = tile_begin(t), count = tile_begin(t + 1) - first;
      const uint64_t bits = tile_seen[t].word[w], differ = bits & ~same[t].word[w];
      if (!differ || all_finite(values, w, differ)) {
        add_runs(count, first, w, bits, values);
        continue;
      }
      for (int r = first; r < first + count; ++r) add_runs(1, r, w, seen[r].word[w], values);
    }
  }

  // Values of the keys in `bits`, run by run, to the accumulators of `count` rows.
  void add_runs(int count, int first, int w, uint64_t bits, const float* const* values) {
    while (bits) {
      const int begin = __builtin_ctzll(bits);
      const uint64_t rest = ~(bits >> begin);
      const int end = rest ? begin + __builtin_ctzll(rest) : kChunk;
      value_tile<float>(count, scores + first * kRowStride, values, w * kChunk + begin, w * kChunk + end, wide, current + first * wide);
      bits = end >= kChunk ? 0 : bits >> end << end;
    }
  }
};

}  // namespace stretto::STRETTO_ISA
