#include "kernels/attention/attention3d.h"

#include "kernels/attention/dense_block.h"

namespace stretto::STRETTO_ISA {

struct KeySpan { int64_t begin, end; };

// What the query at place i (of the queries) sees along the axis.
STRETTO_INLINE KeySpan seen_along(const GridAxis& a, int64_t i) {
  i += a.keys - a.queries;
  if (a.window == 0) return {0, a.causal ? i + 1 : a.keys};
  const int64_t block = i / a.stride * a.stride, n = a.keys, w = a.window;
  if (a.causal) {
    const int64_t leader = block + a.stride - 1 < n - 1 ? block + a.stride - 1 : n - 1;
    return {leader - w + 1 > 0 ? leader - w + 1 : 0, i + 1};
  }
  int64_t c = block + a.stride / 2 < n - 1 ? block + a.stride / 2 : n - 1;
  const int64_t low = w / 2, high = n - 1 - (w / 2 - 1 + w % 2);
  c = c > high ? high : c;
  c = c < low ? low : c;
  return {c - w / 2, c + w / 2 + w % 2};
}

// How the grid is cut into blocks of queries. Axes that are seen as a whole become one: full attention walks keys like dense attention.
struct GridPlan {
  GridAxis axis[3];
  int64_t size[3], blocks[3];  // queries of a block, and blocks, along each axis
  int tile_rows;
};

static bool is_full(const GridAxis& a) { return !a.causal && (a.window == 0 || a.window == a.keys); }

static GridAxis join(const GridAxis& outer, const GridAxis& inner) { return {outer.queries * inner.queries, outer.keys * inner.keys, 0, 1, false}; }

// Queries of a block along an axis. Those that share a window are kept together; else a few neighbours, whose windows mostly overlap.
static int64_t block_size(const GridAxis& a, int64_t room) {
  constexpr int64_t kNeighbours = 4;
  int64_t n = is_full(a) ? a.queries : a.window == 1 ? 1 : a.stride > 1 ? a.stride : kNeighbours;
  n = n < a.queries ? n : a.queries;
  return n < room ? n : room < 1 ? 1 : room;
}

static GridPlan plan_grid(const Attention3dParams& p) {
  GridPlan g{{p.frames, p.rows, p.columns}, {}, {}, kTileRows};
  const GridAxis one{1, 1, 0, 1, false};
  if (is_full(g.axis[1]) && is_full(g.axis[2])) {
    g.axis[2] = join(g.axis[1], g.axis[2]), g.axis[1] = one;
    if (is_full(g.axis[0])) g.axis[2] = join(g.axis[0], g.axis[2]), g.axis[0] = one;
  }
  const int64_t group = p.t.group();
  int64_t room = queries_of_block(group);
  for (int i = 2; i >= 0; --i) {
    g.size[i] = block_size(g.axis[i], room);
    if (i == 0 && !is_full(g.axis[0])) g.size[0] = room < g.axis[0].queries ? room : g.axis[0].queries;  // the more rows, the fewer keys each
    if (g.size[i] < 1) g.size[i] = 1;
    room /= g.size[i];
    g.blocks[i] = (g.axis[i].queries + g.size[i] - 1) / g.size[i];
  }
  // Tiles that end with a line of queries: the lines of keys that their rows see are then the same.
  const int64_t line = g.size[2] * group;
  for (const int rows : {6, 5, 4})
    if (line % rows == 0) {
      g.tile_rows = rows;
      break;
    }
  return g;
}

// Keys of one line of the grid that stand together in a split.
struct LineKeys {
  int32_t slot, count;
  int64_t t, h, w;
};

template <class T> class GridBlock {
 public:
  GridBlock(const Attention3dParams& params, const GridPlan& plan, int64_t entry_, int64_t kv_head_, int64_t index, int64_t head_, int64_t heads_)
      : p(params),
        g(plan),
        entry(entry_),
        kv_head(kv_head_),
        head(head_),
        heads(heads_),
        block(params.t.head_dim, params.t.softcap, params.rotation != nullptr, block_memory<T>(params.t), plan.tile_rows) {
    for (int i = 2; i >= 0; --i) {
      const int64_t b = index % g.blocks[i];
      index /= g.blocks[i];
      first[i] = b * g.size[i];
      const int64_t left = g.axis[i].queries - first[i];
      count[i] = left < g.size[i] ? left : g.size[i];
      low[i] = seen_along(g.axis[i], first[i]).begin, high[i] = seen_along(g.axis[i], first[i] + count[i] - 1).end;
    }
  }

  void attend() {
    const AttentionTensors& t = p.t;
    const int64_t queries = count[0] * count[1] * count[2];
    const int64_t shift = (g.axis[0].keys * g.axis[1].keys * g.axis[2].keys - t.q_len) * t.head_dim;  // of the queries within rotation
    block.begin(static_cast<int>(queries * heads));
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t q = place(i);
      for (int64_t h = 0; h < heads; ++h)
        block.set_query(static_cast<int>(i * heads + h), static_cast<const T*>(t.q) + t.q_strides.at(entry, q, head + h), t.scale,
                        p.rotation ? p.rotation + shift + q * t.head_dim : nullptr);
    }
    at[0] = low[0], at[1] = low[1], at[2] = low[2];
    while (next_split()) {
      for (int64_t i = 0; i < queries; ++i) {
        const SeenKeys seen = seen_by(i);
        for (int64_t h = 0; h < heads; ++h) block.seen[i * heads + h] = seen;
      }
      block.join_split();
    }
    for (int64_t i = 0; i < queries; ++i)
      for (int64_t h = 0; h < heads; ++h)
        block.finish_row(static_cast<int>(i * heads + h), static_cast<T*>(t.out) + t.out_strides.at(entry, place(i), head + h),
                         t.lse + (entry * t.q_len + place(i)) * t.heads + head + h);
  }

 private:
  const Attention3dParams& p;
  const GridPlan& g;
  int64_t entry, kv_head, head, heads;
  RowBlock<T> block;
  int64_t first[3], count[3];      // queries along each axis
  int64_t low[3], high[3], at[3];  // keys that some query sees; the next one to take
  LineKeys lines[kSplit];
  int num_lines = 0;

  int64_t along(int axis, int64_t i) const {
    return axis == 2 ? first[2] + i % count[2] : axis == 1 ? first[1] + i / count[2] % count[1] : first[0] + i / count[2] / count[1];
  }
  int64_t place(int64_t i) const { return (along(0, i) * g.axis[1].queries + along(1, i)) * g.axis[2].queries + along(2, i); }

  // The next keys of the block, at most a split of them; false if there are none.
  bool next_split() {
    num_lines = 0;
    int n = 0;
    while (n < kSplit && at[0] < high[0] && at[1] < high[1] && at[2] < high[2]) {
      const int64_t left = high[2] - at[2], room = kSplit - n, take = left < room ? left : room;
      lines[num_lines++] = {n, static_cast<int32_t>(take), at[0], at[1], at[2]};
      add_keys(n, (at[0] * g.axis[1].keys + at[1]) * g.axis[2].keys + at[2], take);
      n += static_cast<int>(take);
      if ((at[2] += take) < high[2]) continue;
      at[2] = low[2];
      if (++at[1] < high[1]) continue;
      at[1] = low[1], ++at[0];
    }
    block.keys.count = n;
    return n > 0;
  }

  // Keys position, position + 1, ... of the grid, into places n, n + 1, ...
  void add_keys(int n, int64_t position, int64_t count) {
    const AttentionTensors& t = p.t;
    const int64_t frame = p.rows.keys * p.columns.keys;
    for (int64_t j = 0; j < count; ++j, ++position) {
      const int64_t row = p.frame_index ? slot(position / frame) * frame + position % frame : position;
      const int64_t from = p.frame_index ? 0 : entry;
      block.keys.key[n + j] = static_cast<const T*>(t.k) + t.k_strides.at(from, row, kv_head);
      block.keys.value[n + j] = static_cast<const T*>(t.v) + t.v_strides.at(from, row, kv_head);
      block.keys.rotation[n + j] = p.rotation ? p.rotation + position * t.head_dim : nullptr;
    }
  }

  // Clamped: a recorded step may meet a table that nobody has checked.
  int64_t slot(int64_t f) const {
    const int64_t at = p.frame_index[entry * p.frames.keys + f], slots = p.t.k_len / (p.rows.keys * p.columns.keys);
    return at < 0 ? 0 : at < slots ? at : slots - 1;
  }

  SeenKeys seen_by(int64_t i) const {
    const KeySpan t = seen_along(g.axis[0], along(0, i)), h = seen_along(g.axis[1], along(1, i)), w = seen_along(g.axis[2], along(2, i));
    SeenKeys seen{};
    for (int l = 0; l < num_lines; ++l) {
      const LineKeys& line = lines[l];
      if (line.t < t.begin || line.t >= t.end || line.h < h.begin || line.h >= h.end) continue;
      const int64_t begin = w.begin > line.w ? w.begin - line.w : 0, end = w.end - line.w < line.count ? w.end - line.w : line.count;
      if (begin >= end) continue;
      const SeenKeys more = seen_range(line.slot + begin, line.slot + end);
      for (int k = 0; k < kWords; ++k) seen.word[k] |= more.word[k];
    }
    return seen;
  }
};

void attention3d(const Attention3dParams& p) {
  if (p.t.q_len == 0) return;
  const GridPlan g = plan_grid(p);
  const int64_t blocks = g.blocks[0] * g.blocks[1] * g.blocks[2], group = p.t.group();
  dispatch_float(p.t.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.t.batch * p.t.kv_heads * blocks, 1, [&](int64_t i) {
      const int64_t block = blocks - 1 - i / (p.t.batch * p.t.kv_heads);  // if causal, the last ones see most keys
      const int64_t kv_head = i % p.t.kv_heads, entry = i / p.t.kv_heads % p.t.batch;
      for (int64_t h = 0; h < group; h += kMaxRows)
        GridBlock<T>(p, g, entry, kv_head, block, kv_head * group + h, group - h < kMaxRows ? group - h : kMaxRows).attend();
    });
  });
}

}  // namespace stretto::STRETTO_ISA
