#include "kernels/scan/slstm.h"

#include "common/parallel.h"
#include "kernels/scan/gate_math.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr int kGroup = 4;  // sequences that share a load of R
// Independent chains of sums hide the latency of the multiply-add: 8 vectors for one sequence, 2 for each of four. AVX2 has half the registers.
#if defined(STRETTO_ISA_avx512)
constexpr int kOneVecs = 8, kGroupVecs = 4;
#else
constexpr int kOneVecs = 4, kGroupVecs = 1;
#endif

struct Cell {  // one sequence of a group
  int64_t first = 0, count = 0, slot = -1;
  float *y, *c, *n, *m, *raw;  // dim each, raw 4 * dim; this thread's scratch
};

// raw[j .. j + 16 V) += sum_d y[d] R[d, j ..] for S sequences; the last of them may repeat.
template <int S, int V, class W> void gate_tile(float* const* raw, const float* const* y, const W* r, int64_t dim, int64_t j, int64_t cols) {
  const int tail = static_cast<int>(cols - j < kLanes ? cols - j : kLanes);  // below 16 with V = 1 only
  f32x16 sum[S][V];
  for (int s = 0; s < S; ++s)
    for (int x = 0; x < V; ++x) sum[s][x] = load_first(raw[s] + j + x * kLanes, tail);
  for (int64_t d = 0; d < dim; ++d) {
    const W* row = r + d * cols + j;
    f32x16 w[V];
    for (int x = 0; x < V; ++x) w[x] = tail == kLanes ? load(row + x * kLanes) : load_some(row, tail);
    for (int s = 0; s < S; ++s) {
      const f32x16 v = broadcast(y[s][d]);
      for (int x = 0; x < V; ++x) sum[s][x] = fma(v, w[x], sum[s][x]);
    }
  }
  for (int s = 0; s < S; ++s)
    for (int x = 0; x < V; ++x) store_first(raw[s] + j + x * kLanes, sum[s][x], tail);
}

template <int S, int V, class W> void gate_products(float* const* raw, const float* const* y, const W* r, int64_t dim) {
  const int64_t cols = 4 * dim, wide = cols / (V * kLanes) * (V * kLanes);
  for (int64_t j = 0; j < wide; j += V * kLanes) gate_tile<S, V>(raw, y, r, dim, j, cols);
  for (int64_t j = wide; j < cols; j += kLanes) gate_tile<S, 1>(raw, y, r, dim, j, cols);
}

void cell_update(const Cell& s, int64_t dim) {
  for (int64_t e = 0; e < dim; e += kLanes) {
    const int count = static_cast<int>(dim - e < kLanes ? dim - e : kLanes);
    const f32x16 n = load_first(s.n + e, count), i = load_first(s.raw + e, count), lf = log_sigmoid(load_first(s.raw + dim + e, count));
    float old[kLanes], in[kLanes], held[kLanes], next[kLanes];
    store(old, add(lf, load_first(s.m + e, count)));
    store(in, i);
    store(held, n);
    for (int x = 0; x < kLanes; ++x) {
      old[x] = held[x] == 0.f ? -__builtin_inff() : old[x];
      next[x] = old[x] > in[x] || old[x] != old[x] ? old[x] : in[x];
    }
    const f32x16 m = load(next), keep = exp_gate(sub(load(old), m)), take = exp_gate(sub(i, m));
    const f32x16 c = fma(keep, load_first(s.c + e, count), mul(take, tanh(load_first(s.raw + 2 * dim + e, count))));
    const f32x16 total = fma(keep, n, take);
    store_first(s.c + e, c, count);
    store_first(s.n + e, total, count);
    store_first(s.m + e, m, count);
    store_first(s.y + e, mul(sigmoid(load_first(s.raw + 3 * dim + e, count)), div(c, total)), count);
  }
}

// Sequence b of the batch as a cell, its state copied to scratch; idle ones get their zeros here and have no tokens.
template <class T> Cell start(const SlstmParams& p, int64_t b, int64_t h, float* scratch) {
  Cell s;
  s.first = p.cu_seqlens ? (p.cu_seqlens[b] < 0 ? 0 : p.cu_seqlens[b]) : b;
  const int64_t end = p.cu_seqlens ? p.cu_seqlens[b + 1] : b + 1, last = end < p.tokens ? end : p.tokens;
  s.count = last > s.first ? last - s.first : 0;
  s.slot = !p.slots ? b : p.slots[b] >= 0 && p.slots[b] < p.num_slots ? p.slots[b] : -1;
  s.y = scratch, s.c = s.y + p.dim, s.n = s.c + p.dim, s.m = s.n + p.dim, s.raw = s.m + p.dim;
  if (s.slot < 0) {
    for (int64_t t = 0; t < s.count; ++t)
      for (int64_t e = 0; e < p.dim; ++e) from_float(static_cast<T*>(p.out)[((s.first + t) * p.heads + h) * p.dim + e], 0.f);
    s.count = 0;
    return s;
  }
  const float* state = p.state + (s.slot * 4 * p.heads + h) * p.dim;
  for (int g = 0; g < 4; ++g) std::memcpy(s.y + g * p.dim, state + g * p.heads * p.dim, sizeof(float) * static_cast<size_t>(p.dim));
  return s;
}

template <class T> void load_inputs(const SlstmParams& p, const Cell& s, int64_t t, int64_t h) {
  for (int g = 0; g < 4; ++g) {
    const T* x = static_cast<const T*>(p.Wx) + (s.first + t) * p.token_stride + g * p.gate_stride + h * p.head_stride;
    const float* b = p.b + (g * p.heads + h) * p.dim;
    for (int64_t e = 0; e < p.dim; ++e) s.raw[g * p.dim + e] = to_float(x[e]) + b[e];
  }
}

template <class T> void store_output(const SlstmParams& p, const Cell& s, int64_t t, int64_t h) {
  T* out = static_cast<T*>(p.out) + ((s.first + t) * p.heads + h) * p.dim;
  for (int64_t e = 0; e < p.dim; e += kLanes) {
    if (e + kLanes <= p.dim) store(out + e, load(s.y + e));
    else store_some(out + e, load_first(s.y + e, static_cast<int>(p.dim - e)), static_cast<int>(p.dim - e));
  }
}

template <class T, class W> void run_group(const SlstmParams& p, int64_t group, int64_t h) {
  const int64_t begin = group * kGroup, members = p.batch - begin < kGroup ? p.batch - begin : kGroup;
  float* scratch = static_cast<float*>(thread_scratch(0, kGroup * 8 * p.dim * 4));
  Cell cells[kGroup];
  int64_t longest = 0;
  for (int64_t s = 0; s < members; ++s) {
    cells[s] = start<T>(p, begin + s, h, scratch + s * 8 * p.dim);
    longest = cells[s].count > longest ? cells[s].count : longest;
  }
  const W* r = static_cast<const W*>(p.R) + h * p.dim * 4 * p.dim;
  for (int64_t t = 0; t < longest; ++t) {
    float* raw[kGroup];
    const float* y[kGroup];
    int active = 0;
    for (int64_t s = 0; s < members; ++s) {
      if (t >= cells[s].count) continue;
      load_inputs<T>(p, cells[s], t, h);
      raw[active] = cells[s].raw, y[active] = cells[s].y;
      ++active;
    }
    if (active == 1) {
      gate_products<1, kOneVecs>(raw, y, r, p.dim);
    } else {
      float* spare = static_cast<float*>(thread_scratch(1, 4 * p.dim * 4));  // sums of rows that are not there
      if (active < kGroup) std::memset(spare, 0, sizeof(float) * static_cast<size_t>(4 * p.dim));
      for (int s = active; s < kGroup; ++s) raw[s] = spare, y[s] = y[0];
      gate_products<kGroup, kGroupVecs>(raw, y, r, p.dim);
    }
    for (int64_t s = 0; s < members; ++s) {
      if (t >= cells[s].count) continue;
      cell_update(cells[s], p.dim);
      store_output<T>(p, cells[s], t, h);
    }
  }
  if (!p.update) return;
  for (int64_t s = 0; s < members; ++s) {
    if (cells[s].slot < 0 || cells[s].count == 0) continue;
    float* state = p.state + (cells[s].slot * 4 * p.heads + h) * p.dim;
    for (int g = 0; g < 4; ++g) std::memcpy(state + g * p.heads * p.dim, cells[s].y + g * p.dim, sizeof(float) * static_cast<size_t>(p.dim));
  }
}

}  // namespace

void slstm(const SlstmParams& p) {
  const int64_t groups = (p.batch + kGroup - 1) / kGroup;
  if (p.dim == 0) return;
  dispatch_float(p.dtype, [&](auto tag) {
    dispatch_float(p.weight_dtype, [&](auto weight_tag) {
      parallel_for(0, groups * p.heads, 1,
                   [&](int64_t i) { run_group<typename decltype(tag)::type, typename decltype(weight_tag)::type>(p, i % groups, i / groups); });
    });
  });
}

}  // namespace stretto::STRETTO_ISA
