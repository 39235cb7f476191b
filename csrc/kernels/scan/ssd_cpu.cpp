#include "kernels/scan/ssd_rows.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr int kRowsAtOnce = 4;  // of a product's tile: with 4 vectors of 16 columns, 16 sums hide the latency of a multiply-add
#if defined(STRETTO_ISA_avx512)
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 1;  // 16 columns are two registers of sixteen
#endif
constexpr int64_t kHeads = 4;  // of one group to a task: they share C B^T, whose cost is a fifth of a head's at 64 rows a chunk

// acc[r][v] += sum_k a[r * row + k * step] * b[k * stride + 16 v], k ascending.
template <int kR, int kV>
STRETTO_INLINE void product(f32x16 (&acc)[kR][kV], const float* a, int64_t row, int64_t step, const float* b, int64_t stride, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    f32x16 right[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) right[v] = load(b + k * stride + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      const f32x16 left = broadcast(a[r * row + k * step]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) acc[r][v] = fma(left, right[v], acc[r][v]);
    }
  }
}

// f.operator()<rows, vectors>(row, column) over [rows) x [columns), columns a multiple of 16.
template <int kV, class F> STRETTO_INLINE void for_rows(int64_t rows, int64_t column, const F& f) {
  int64_t i = 0;
  for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) f.template operator()<kRowsAtOnce, kV>(i, column);
  for (; i < rows; ++i) f.template operator()<1, kV>(i, column);
}
template <class F> STRETTO_INLINE void for_tiles(int64_t rows, int64_t columns, const F& f) {
  int64_t c = 0;
  if constexpr (kMaxVectors == 4) {
    for (; c + 4 * kLanes <= columns; c += 4 * kLanes) for_rows<4>(rows, c, f);
  }
  for (; c < columns; c += kLanes) for_rows<1>(rows, c, f);
}

// 2^(hi + lo) for an integral hi and |lo| <= 1; 0 and infinity beyond the range, NaN where lo is NaN.
STRETTO_INLINE f32x16 exp2_of(f32x16 hi, f32x16 lo) {
  const f32x16 k = round_even(lo), n = add(hi, k), bounded = min(max(n, broadcast(-126.f)), broadcast(127.f));
  const f32x16 value = mul(decay_in_range(sub(lo, k), broadcast(1.f)), exp2_integral(bounded));
  const f32x16 low = where_greater(sub(zero(), n), 126.5f, zero(), value);
  return where_greater(n, 127.5f, broadcast(__builtin_inff()), low);
}

// Working memory of a task: a chunk of the heads of one group.
struct Chunk {
  int64_t rows, dim, states;                // padded
  float *delta, *hi, *lo, *start, *weight;  // [rows]: cs = hi + lo; start = 2^cs, weight = delta 2^(cs_end - cs)
  float *b, *c;                             // [rows][states]
  float* bt;                                // [states][rows]
  float *scores, *mixed;                    // [rows][rows]: C B^T, and that times decay and delta
  float *x, *weighted, *y;                  // [rows][dim]
  float* h[kHeads];                         // [states][dim]

  Chunk(const SsdInputs& in, int64_t length) : rows(padded(length)), dim(padded(in.dim)), states(padded(in.states)) {
    const int64_t floats = rows * (5 + 3 * states + 2 * rows + 3 * dim) + kHeads * states * dim;
    float* p = static_cast<float*>(thread_scratch(0, 4 * floats));
    const auto take = [&p](int64_t n) {
      float* q = p;
      p += n;
      return q;
    };
    delta = take(rows), hi = take(rows), lo = take(rows), start = take(rows), weight = take(rows);
    b = take(rows * states), c = take(rows * states), bt = take(rows * states);
    scores = take(rows * rows), mixed = take(rows * rows);
    x = take(rows * dim), weighted = take(rows * dim), y = take(rows * dim);
    for (float*& head : h) head = take(states * dim);
  }
};

// B, C and C B^T of a chunk; of the scores only what lies on or below the diagonal is right.
template <class T> void chunk_scores(Chunk& k, const SsdInputs& in, int64_t group, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    widen_padded(k.b + i * k.states, static_cast<const T*>(in.b) + (first + i) * in.b_stride + group * in.states, in.states);
    widen_padded(k.c + i * k.states, static_cast<const T*>(in.c) + (first + i) * in.c_stride + group * in.states, in.states);
  }
  for (int64_t i = 0; i < count; i += kLanes)
    for (int64_t n = 0; n < in.states; n += kLanes) {
      const int lanes = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
      float turned[kLanes * kLanes];
      load_columns(turned, k.b + i * k.states + n, k.states, 1, lanes, kLanes);
      for (int l = 0; l < kLanes; ++l) store(k.bt + (n + l) * k.rows + i, load(turned + l * kLanes));
    }
  for_tiles(count, padded(count), [&]<int kR, int kV>(int64_t i, int64_t j) {
    if (j > i + kR - 1) return;  // above the diagonal
    f32x16 acc[kR][kV];
    for (auto& row : acc)
      for (auto& v : row) v = zero();
    product(acc, k.c + i * k.states, k.states, 1, k.bt + j, k.rows, in.states);
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) store(k.scores + (i + r) * k.rows + j + v * kLanes, acc[r][v]);
  });
}

// delta, its running sum times A, and what follows from it.
template <class T> void chunk_rates(Chunk& k, const SsdInputs& in, int64_t head, int64_t first, int64_t count) {
  ssd_deltas<T>(k.delta, in, head, {first, nullptr}, 0, count);
  const double rate = static_cast<double>(in.a[head]) * 1.4426950408889634;
  double sum = 0;
  for (int64_t i = 0; i < k.rows; ++i) {
    if (i < count) sum += static_cast<double>(k.delta[i]) * rate;
    const double whole = __builtin_rint(sum);
    k.hi[i] = static_cast<float>(whole);
    k.lo[i] = static_cast<float>(sum - whole);
  }
  const f32x16 end_hi = broadcast(k.hi[count - 1]), end_lo = broadcast(k.lo[count - 1]);
  for (int64_t i = 0; i < count; i += kLanes) {
    const f32x16 hi = load(k.hi + i), lo = load(k.lo + i);
    store(k.start + i, exp2_of(hi, lo));
    store(k.weight + i, mul(load(k.delta + i), exp2_of(sub(end_hi, hi), sub(end_lo, lo))));
  }
  for (int64_t i = 0; i < count; ++i) {
    const f32x16 hi = broadcast(k.hi[i]), lo = broadcast(k.lo[i]);
    for (int64_t j = 0; j <= i; j += kLanes) {
      const f32x16 decayed = mul(load(k.scores + i * k.rows + j), exp2_of(sub(hi, load(k.hi + j)), sub(lo, load(k.lo + j))));
      store(k.mixed + i * k.rows + j, mul(decayed, load(k.delta + j)));
    }
  }
}

template <class T> void chunk_head(Chunk& k, const SsdInputs& in, int64_t head, float* h, int64_t first, int64_t count, void* y) {
  chunk_rates<T>(k, in, head, first, count);
  for (int64_t i = 0; i < count; ++i) {
    widen_padded(k.x + i * k.dim, static_cast<const T*>(in.x) + (first + i) * in.x_stride + head * in.dim, in.dim);
    for (int64_t p = 0; p < k.dim; p += kLanes) store(k.weighted + i * k.dim + p, mul(broadcast(k.weight[i]), load(k.x + i * k.dim + p)));
  }
  for_tiles(count, k.dim, [&]<int kR, int kV>(int64_t i, int64_t p) {
    f32x16 acc[kR][kV];
    for (auto& row : acc)
      for (auto& v : row) v = zero();
    product(acc, k.c + i * k.states, k.states, 1, h + p, k.dim, in.states);
    for (int r = 0; r < kR; ++r)
      for (auto& v : acc[r]) v = mul(v, broadcast(k.start[i + r]));
    product(acc, k.mixed + i * k.rows, k.rows, 1, k.x + p, k.dim, i + 1);
    for (int r = 1; r < kR; ++r)  // the corner below the diagonal, entry by entry: a later row's NaN must not be touched
      for (int j = 1; j <= r; ++j)
        for (int v = 0; v < kV; ++v)
          acc[r][v] = fma(broadcast(k.mixed[(i + r) * k.rows + i + j]), load(k.x + (i + j) * k.dim + p + v * kLanes), acc[r][v]);
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) store(k.y + (i + r) * k.dim + p + v * kLanes, acc[r][v]);
  });
  const f32x16 kept = broadcast(k.start[count - 1]);
  for_tiles(in.states, k.dim, [&]<int kR, int kV>(int64_t n, int64_t p) {
    f32x16 acc[kR][kV];
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) acc[r][v] = mul(kept, load(h + (n + r) * k.dim + p + v * kLanes));
    product(acc, k.b + n, 1, k.states, k.weighted + p, k.dim, count);
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) store(h + (n + r) * k.dim + p + v * kLanes, acc[r][v]);
  });
  for (int64_t i = 0; i < count; ++i) ssd_output<T>(in, head, first + i, k.y + i * k.dim, k.x + i * k.dim, y);
}

// State memory [dim, states] to and from the chunk's [states][dim].
void load_head(float* h, const Chunk& k, const SsdInputs& in, const float* state, int64_t row, int64_t column) {
  for (int64_t p = 0; p < k.dim; p += kLanes) {
    const int lanes = in.dim - p < kLanes ? static_cast<int>(in.dim - p) : kLanes;
    for (int64_t n = 0; n < in.states; n += kLanes) {
      const int64_t columns = in.states - n < kLanes ? in.states - n : kLanes;
      float turned[kLanes * kLanes] = {};
      if (state) load_columns(turned, state + p * row + n * column, row, column, lanes, columns);
      for (int64_t c = 0; c < columns; ++c) store(h + (n + c) * k.dim + p, load(turned + c * kLanes));
    }
  }
}

void store_head(float* state, const Chunk& k, const SsdInputs& in, const float* h) {
  for (int64_t p = 0; p < in.dim; p += kLanes) {
    const int lanes = in.dim - p < kLanes ? static_cast<int>(in.dim - p) : kLanes;
    for (int64_t n = 0; n < in.states; n += kLanes) {
      const int64_t columns = in.states - n < kLanes ? in.states - n : kLanes;
      float turned[kLanes * kLanes];
      for (int64_t c = 0; c < columns; ++c) store(turned + c * kLanes, load(h + (n + c) * k.dim + p));
      store_columns(state + p * in.states + n, turned, in.states, 1, lanes, columns);
    }
  }
}

template <class T> void ssd_heads(const SsdParams& p, int64_t b, int64_t group, int64_t head0, int64_t heads) {
  const SsdInputs& in = p.in;
  const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1], size = in.dim * in.states;
  const int64_t length = end - begin < p.chunk ? end - begin : p.chunk;
  Chunk k(in, length);
  const int64_t* s = p.h0_strides;
  for (int64_t i = 0; i < heads; ++i) load_head(k.h[i], k, in, p.h0 ? p.h0 + b * s[0] + (head0 + i) * s[1] : nullptr, s[2], s[3]);
  for (int64_t first = begin; first < end; first += length) {
    const int64_t count = end - first < length ? end - first : length;
    chunk_scores<T>(k, in, group, first, count);
    for (int64_t i = 0; i < heads; ++i) chunk_head<T>(k, in, head0 + i, k.h[i], first, count, p.y);
  }
  for (int64_t i = 0; i < heads; ++i) store_head(p.h_last + (b * in.heads + head0 + i) * size, k, in, k.h[i]);
}

}  // namespace

void ssd(const SsdParams& p) {
  const int64_t per_group = p.in.heads / p.in.groups, tasks = (per_group + kHeads - 1) / kHeads;  // of a group
  dispatch_float(p.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.batch * p.in.groups * tasks, 1, [&](int64_t i) {
      const int64_t group = i / tasks % p.in.groups, within = i % tasks * kHeads, heads = per_group - within < kHeads ? per_group - within : kHeads;
      ssd_heads<T>(p, i / tasks / p.in.groups, group, group * per_group + within, heads);
    });
  });
}

}  // namespace stretto::STRETTO_ISA
