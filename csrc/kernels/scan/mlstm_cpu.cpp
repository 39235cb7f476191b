#include "kernels/scan/mlstm.h"

#include "common/parallel.h"
#include "kernels/scan/gate_math.h"
#include "kernels/scan/mlstm_tile.h"

namespace stretto::STRETTO_ISA {
namespace {

struct Sequence {
  int64_t first, count;  // tokens as counted in coefficients; `first` for its strides too when packed
  int64_t batch;         // multiplies strides.batch
  int64_t slot;          // -1: idle
};

Sequence sequence_of(const MlstmParams& p, int64_t b) {
  Sequence s{b * p.seq_len, p.seq_len, b, b};
  if (p.cu_seqlens) {
    s.first = p.cu_seqlens[b] < 0 ? 0 : p.cu_seqlens[b];
    const int64_t last = p.cu_seqlens[b + 1] < p.tokens ? p.cu_seqlens[b + 1] : p.tokens;
    s.count = last > s.first ? last - s.first : 0;
  }
  if (p.counts && p.counts[b] < s.count) s.count = p.counts[b] < 0 ? 0 : p.counts[b];
  if (p.slots) s.slot = p.slots[b] >= 0 && p.slots[b] < p.num_slots ? p.slots[b] : -1;
  return s;
}

// Element offset of token t of the sequence, head h.
int64_t offset(const MlstmParams& p, const Sequence& s, const MlstmStrides& strides, int64_t t, int64_t h) {
  const int64_t row = p.cu_seqlens ? (s.first + t) * strides.token : s.batch * strides.batch + t * strides.token;
  return row + h * strides.head;
}

// a, b and the denominator of each token, [heads][tokens]: computed once, read by every slice of C.
struct Coefficients { float *a, *b, *d; };

template <class T> void gather_gates(float* out, const T* gates, int64_t stride, int count) {
  for (int i = 0; i < count; ++i) out[i] = to_float(gates[i * stride]);
}

// a, b and e^-m (in d) of up to kGateBlock tokens; `m` moves on.
constexpr int kGateBlock = 64;
template <class G> void gates(const MlstmParams& p, const G* i_gates, const G* f_gates, int count, const Coefficients& c, float& m) {
  float i[kGateBlock] = {}, f[kGateBlock] = {}, keep[kGateBlock], add_[kGateBlock], low[kGateBlock];
  gather_gates(i, i_gates, p.i_strides.token, count);
  gather_gates(f, f_gates, p.f_strides.token, count);
  for (int t = 0; t < count; t += kLanes) {
    f32x16 iv = load(i + t), fv = load(f + t);
    if (p.cap > 0) {
      iv = soft_cap(iv, p.cap);
      fv = soft_cap(fv, p.cap);
    }
    store(i + t, p.sigmoid ? sigmoid(iv) : iv);
    store(f + t, p.sigmoid ? sigmoid(fv) : log_sigmoid(fv));
  }
  if (p.sigmoid) {
    std::memcpy(c.a, f, sizeof(float) * static_cast<size_t>(count));
    std::memcpy(c.b, i, sizeof(float) * static_cast<size_t>(count));
    return;
  }
  for (int t = 0; t < count; ++t) {
    const float decayed = f[t] + m;
    m = decayed > i[t] || decayed != decayed ? decayed : i[t];  // NaN of either side stays
    const bool empty = m == -__builtin_inff();                  // -inf - -inf would be NaN
    keep[t] = empty ? m : decayed - m;
    add_[t] = empty ? m : i[t] - m;
    low[t] = -m;
  }
  for (int t = 0; t < count; t += kLanes) {
    const int n = count - t < kLanes ? count - t : kLanes;
    store_first(c.a + t, exp_gate(load_first(keep + t, n)), n);
    store_first(c.b + t, exp_gate(load_first(add_ + t, n)), n);
    store_first(c.d + t, exp_gate(load_first(low + t, n)), n);
  }
}

template <class T> f32x16 load_row(const T* x, int64_t at, int64_t size) {
  return at + kLanes <= size ? load(x + at) : load_some(x + at, static_cast<int>(size - at));
}

// n' = a n + b k, and |q^T n'| * scale where q is given (else 0). n is padded to whole lanes.
template <class T> float step_normaliser(float* n, const T* k, const T* q, int64_t dk, float a, float b, float scale) {
  f32x16 dot = zero();
  for (int64_t j = 0; j < dk; j += kLanes) {
    const f32x16 next = fma(broadcast(a), load(n + j), mul(broadcast(b), load_row(k, j, dk)));
    store(n + j, next);
    if (q) dot = fma(mul(load_row(q, j, dk), broadcast(scale)), next, dot);
  }
  return __builtin_fabsf(reduce_add(dot));
}

template <class T, class G> void scan_gates(const MlstmParams& p, const Sequence& s, int64_t h, const Coefficients& all) {
  float m = p.sigmoid ? 0.f : p.m[s.slot * p.heads + h];
  const int64_t padded = (p.dk + kLanes - 1) / kLanes * kLanes;
  float* n = static_cast<float*>(thread_scratch(1, padded * 4));
  float* state_n = p.sigmoid ? nullptr : p.n + (s.slot * p.heads + h) * p.dk;
  if (!p.sigmoid) {
    std::memset(n, 0, sizeof(float) * static_cast<size_t>(padded));
    std::memcpy(n, state_n, sizeof(float) * static_cast<size_t>(p.dk));
  }
  for (int64_t t0 = 0; t0 < s.count; t0 += kGateBlock) {
    const int count = static_cast<int>(s.count - t0 < kGateBlock ? s.count - t0 : kGateBlock);
    const int64_t at = h * p.tokens + s.first + t0;
    const Coefficients c{all.a + at, all.b + at, all.d + at};
    gates(p, static_cast<const G*>(p.i) + offset(p, s, p.i_strides, t0, h), static_cast<const G*>(p.f) + offset(p, s, p.f_strides, t0, h), count, c,
          m);
    if (p.sigmoid) continue;
    for (int t = 0; t < count; ++t) {
      const T* k = static_cast<const T*>(p.k) + offset(p, s, p.k_strides, t0 + t, h);
      const T* q = p.q ? static_cast<const T*>(p.q) + offset(p, s, p.q_strides, t0 + t, h) : nullptr;
      const float dot = step_normaliser(n, k, q, p.dk, c.a[t], c.b[t], p.scale);
      c.d[t] = (dot > c.d[t] || dot != dot ? dot : c.d[t]) + p.eps;
    }
  }
  if (p.sigmoid || !p.update) return;
  p.m[s.slot * p.heads + h] = m;
  std::memcpy(state_n, n, sizeof(float) * static_cast<size_t>(p.dk));
}

// Columns of C that one task owns.
struct Slice { int64_t begin, cols; };

// A block of tokens packed for the tiles, in this thread's scratch.
struct Block {
  float *bk, *q, *v, *h;
  int64_t tokens;
};

Block block_scratch(const MlstmParams& p, int64_t cols, int64_t tokens) {
  const int64_t row_lanes = (p.dk + kLanes - 1) / kLanes * kLanes, col_lanes = (cols + kTileCols - 1) / kTileCols * kTileCols;
  float* at = static_cast<float*>(thread_scratch(1, 2 * tokens * (row_lanes + col_lanes) * 4));
  return {at, at + tokens * row_lanes, at + 2 * tokens * row_lanes, at + tokens * (2 * row_lanes + col_lanes), tokens};
}

template <class T> void pack(const MlstmParams& p, const Sequence& s, int64_t h, int64_t t0, const Slice& slice, const Coefficients& c,
                             const Block& x) {
  const T* k = static_cast<const T*>(p.k) + offset(p, s, p.k_strides, t0, h);
  const T* v = static_cast<const T*>(p.v) + offset(p, s, p.v_strides, t0, h) + slice.begin;
  const T* q = p.q ? static_cast<const T*>(p.q) + offset(p, s, p.q_strides, t0, h) : nullptr;
  const float* b = c.b + h * p.tokens + s.first + t0;
  for (int64_t t = 0; t < x.tokens; ++t) {
    for (int64_t j = 0; j < p.dk; j += kLanes) {
      const int64_t at = (j / kLanes * x.tokens + t) * kLanes;
      store(x.bk + at, mul(load_row(k + t * p.k_strides.token, j, p.dk), broadcast(b[t])));
      if (q) store(x.q + at, mul(load_row(q + t * p.q_strides.token, j, p.dk), broadcast(p.scale)));
    }
    for (int64_t j = 0; j < slice.cols; j += kLanes) {
      const int64_t at = (j / kTileCols * x.tokens + t) * kTileCols + j % kTileCols;
      store(x.v + at, load_row(v + t * p.v_strides.token, j, slice.cols));
    }
  }
  const int64_t h_floats = (slice.cols + kTileCols - 1) / kTileCols * kTileCols * x.tokens;
  if (q) std::memset(x.h, 0, sizeof(float) * static_cast<size_t>(h_floats));
}

// R rows from row r on, columns of tile `j`.
template <int R, bool kRead> void tile(const MlstmParams& p, float* c, const Slice& slice, int64_t r, int64_t j, const float* a, const Block& x) {
  const int64_t key = r / kLanes * kLanes * x.tokens + r % kLanes, line = j * kTileCols * x.tokens, cols = slice.cols - j * kTileCols;
  const TilePass pass{x.bk + key, x.q + key, x.v + line, x.h + line, a, x.tokens};
  float* at = c + r * p.dv + j * kTileCols;
  if (cols >= kTileCols) tile_pass<R, kRead>(at, p.dv, p.update, pass);
  else edge_pass<R, kRead>(at, p.dv, cols, p.update, pass);
}

template <bool kRead> void walk_tiles(const MlstmParams& p, float* c, const Slice& slice, const float* a, const Block& x) {
  const int64_t tiles = (slice.cols + kTileCols - 1) / kTileCols, whole = p.dk / kTileRows * kTileRows;
  // Few tokens: C is what moves, so walk it in the order of memory and fetch the next rows meanwhile. Many: v and h are what moves.
  constexpr int64_t kFew = 16;
  if (x.tokens <= kFew) {
    for (int64_t r = 0; r < whole; r += kTileRows)
      for (int64_t j = 0; j < tiles; ++j) {
        if (r + 2 * kTileRows <= p.dk)
          for (int64_t ahead = r + kTileRows; ahead < r + 2 * kTileRows; ++ahead)
            for (int x16 = 0; x16 < kTileVecs; ++x16) __builtin_prefetch(c + ahead * p.dv + j * kTileCols + x16 * kLanes, 1);
        tile<kTileRows, kRead>(p, c, slice, r, j, a, x);
      }
  } else {
    for (int64_t j = 0; j < tiles; ++j)
      for (int64_t r = 0; r < whole; r += kTileRows) tile<kTileRows, kRead>(p, c, slice, r, j, a, x);
  }
  for (int64_t r = whole; r < p.dk; ++r)
    for (int64_t j = 0; j < tiles; ++j) tile<1, kRead>(p, c, slice, r, j, a, x);
}

template <class T> void finish(const MlstmParams& p, const Sequence& s, int64_t h, int64_t t0, const Slice& slice, const float* d, const Block& x) {
  T* out = static_cast<T*>(p.out) + offset(p, s, p.out_strides, t0, h) + slice.begin;
  for (int64_t t = 0; t < x.tokens; ++t) {
    T* row = out + t * p.out_strides.token;
    for (int64_t j = 0; j < slice.cols; j += kLanes) {
      f32x16 value = load(x.h + (j / kTileCols * x.tokens + t) * kTileCols + j % kTileCols);
      if (!p.sigmoid) value = div(value, broadcast(d[t]));
      if (j + kLanes <= slice.cols) store(row + j, value);
      else store_some(row + j, value, static_cast<int>(slice.cols - j));
    }
  }
}

template <class T> void zero_rows(const MlstmParams& p, const Sequence& s, int64_t h, const Slice& slice) {
  for (int64_t t = 0; t < s.count; ++t) {
    T* row = static_cast<T*>(p.out) + offset(p, s, p.out_strides, t, h) + slice.begin;
    for (int64_t j = 0; j < slice.cols; ++j) from_float(row[j], 0.f);
  }
}

template <class T> void run_slice(const MlstmParams& p, const Sequence& s, int64_t h, const Slice& slice, const Coefficients& c) {
  float* state = p.C + (s.slot * p.heads + h) * p.dk * p.dv + slice.begin;
  // A state that is not written back cannot carry from block to block: all tokens are one block then.
  const int64_t block = p.update && p.block < s.count ? p.block : s.count;
  for (int64_t t0 = 0; t0 < s.count; t0 += block) {
    const Block x = block_scratch(p, slice.cols, s.count - t0 < block ? s.count - t0 : block);
    const float* a = c.a + h * p.tokens + s.first + t0;
    pack<T>(p, s, h, t0, slice, c, x);
    if (p.q) {
      walk_tiles<true>(p, state, slice, a, x);
      finish<T>(p, s, h, t0, slice, c.d + h * p.tokens + s.first + t0, x);
    } else {
      walk_tiles<false>(p, state, slice, a, x);
    }
  }
}

// Columns a task owns. Wide, so that packing k and q is a small part and a step reads C in long runs; yet sixteen tasks where sizes allow.
int64_t slice_width(const MlstmParams& p) {
  int64_t width = (p.dv / 64 + 1) * 64;
  while (width > 64 && p.batch * p.heads * ((p.dv + width - 1) / width) < 16) width = (width / 2 + 63) / 64 * 64;
  return width;
}

}  // namespace

void mlstm(const MlstmParams& p) {
  const int64_t pairs = p.batch * p.heads, tokens = p.cu_seqlens ? p.tokens : p.batch * p.seq_len;
  if (pairs == 0 || tokens == 0) return;
  float* scratch = static_cast<float*>(thread_scratch(0, 3 * p.heads * p.tokens * 4));
  const Coefficients c{scratch, scratch + p.heads * p.tokens, scratch + 2 * p.heads * p.tokens};
  const int64_t width = slice_width(p), slices = (p.dv + width - 1) / width;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_float(p.gate_dtype, [&](auto gate_tag) {
      using G = typename decltype(gate_tag)::type;
      const int64_t grain = 16384 / ((tokens / p.batch + 1) * (p.dk + 64)) + 1;  // about 10 us
      parallel_for(0, pairs, grain, [&](int64_t i) {
        const Sequence s = sequence_of(p, i / p.heads);
        if (s.slot >= 0 && s.count > 0) scan_gates<T, G>(p, s, i % p.heads, c);
      });
    });
    parallel_for(0, pairs * slices, 1, [&](int64_t i) {
      const int64_t h = i / slices % p.heads, begin = i % slices * width;
      const Sequence s = sequence_of(p, i / slices / p.heads);
      const Slice slice{begin, p.dv - begin < width ? p.dv - begin : width};
      if (s.count == 0) return;
      if (s.slot >= 0) run_slice<T>(p, s, h, slice, c);
      else if (p.out) zero_rows<T>(p, s, h, slice);
    });
  });
}

}  // namespace stretto::STRETTO_ISA
