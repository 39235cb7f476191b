#include "kernels/scan/scan_rows.h"
#include "kernels/scan/ssd_rows.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr int64_t kTileRows = 64;
// Registers of state that one channel of a head advances at a time: 128 states with AVX-512, half of that where 16 lanes take two registers.
#if defined(STRETTO_ISA_avx512)
constexpr int kVectors = 8;
#else
constexpr int kVectors = 4;
#endif

// Working memory of a task: a tile of rows of one head.
struct HeadTile {
  int64_t states, dim;    // padded
  float *delta, *factor;  // [kTileRows]
  float *b, *c;           // [kTileRows][states]
  float *x, *dx, *y;      // [kTileRows][dim]
  float* sums;            // [kTileRows][16]: of one channel
  float* h;               // [dim of the head][states]

  explicit HeadTile(const SsdInputs& in) : states(padded(in.states)), dim(padded(in.dim)) {
    const int64_t floats = kTileRows * (2 + 2 * states + 3 * dim + kLanes) + in.dim * states;
    float* p = static_cast<float*>(thread_scratch(0, 4 * floats));
    const auto take = [&p](int64_t n) {
      float* q = p;
      p += n;
      return q;
    };
    delta = take(kTileRows), factor = take(kTileRows);
    b = take(kTileRows * states), c = take(kTileRows * states);
    x = take(kTileRows * dim), dx = take(kTileRows * dim), y = take(kTileRows * dim);
    sums = take(kTileRows * kLanes);
    h = take(in.dim * states);
  }
};

template <class T> void prepare(HeadTile& k, const SsdInputs& in, int64_t head, SsdRows rows, int64_t row, int64_t count) {
  const int64_t group = head / (in.heads / in.groups);
  const f32x16 rate = mul(broadcast(in.a[head]), broadcast(1.44269504088896341f));
  ssd_deltas<T>(k.delta, in, head, rows, row, count);
  for (int64_t i = 0; i < count; i += kLanes) store(k.factor + i, decay(load(k.delta + i), rate));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = rows[row + i];
    widen_padded(k.b + i * k.states, static_cast<const T*>(in.b) + t * in.b_stride + group * in.states, in.states);
    if (in.c) widen_padded(k.c + i * k.states, static_cast<const T*>(in.c) + t * in.c_stride + group * in.states, in.states);
    widen_padded(k.x + i * k.dim, static_cast<const T*>(in.x) + t * in.x_stride + head * in.dim, in.dim);
    for (int64_t p = 0; p < k.dim; p += kLanes) store(k.dx + i * k.dim + p, mul(broadcast(k.delta[i]), load(k.x + i * k.dim + p)));
  }
}

// One channel's kCount * 16 states over `count` rows; sums of C h are added to in lanes.
template <int kCount, bool kOutput> STRETTO_INLINE void advance(float* h, const HeadTile& k, int64_t p, int64_t n, int64_t count) {
  f32x16 state[kCount];
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) state[v] = load(h + v * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const f32x16 factor = broadcast(k.factor[i]), dx = broadcast(k.dx[i * k.dim + p]);
    const float *b = k.b + i * k.states + n, *c = k.c + i * k.states + n;
    f32x16 sum = kOutput ? load(k.sums + i * kLanes) : zero();
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) {
      state[v] = fma(factor, state[v], mul(dx, load(b + v * kLanes)));
      if (kOutput) sum = fma(load(c + v * kLanes), state[v], sum);
    }
    if (kOutput) store(k.sums + i * kLanes, sum);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kCount; ++v) store(h + v * kLanes, state[v]);
}

// A tile of rows, prepared: h (rows of channels, `stride` floats apart) advances; k.y gets sum_n C h.
template <bool kOutput> void advance_head(float* h, int64_t stride, HeadTile& k, int64_t dim, int64_t count) {
  for (int64_t p = 0; p < dim; ++p) {
    if (kOutput) std::memset(k.sums, 0, static_cast<size_t>(count) * kLanes * 4);
    float* row = h + p * stride;
    int64_t n = 0;
    for (; n + kVectors * kLanes <= k.states; n += kVectors * kLanes) advance<kVectors, kOutput>(row + n, k, p, n, count);
    for (; n < k.states; n += kLanes) advance<1, kOutput>(row + n, k, p, n, count);
    if (kOutput)
      for (int64_t i = 0; i < count; ++i) k.y[i * k.dim + p] = reduce_add(load(k.sums + i * kLanes));
  }
}

template <class T, bool kOutput>
void advance_rows(float* h, int64_t stride, HeadTile& k, const SsdInputs& in, int64_t head, SsdRows rows, int64_t count, void* y) {
  for (int64_t row = 0; row < count; row += kTileRows) {
    const int64_t some = count - row < kTileRows ? count - row : kTileRows;
    prepare<T>(k, in, head, rows, row, some);
    advance_head<kOutput>(h, stride, k, in.dim, some);
    if (kOutput)
      for (int64_t i = 0; i < some; ++i) ssd_output<T>(in, head, rows[row + i], k.y + i * k.dim, k.x + i * k.dim, y);
  }
}

// A head's state as dense rows of padded length, and back.
void load_head(float* h, const HeadTile& k, const SsdInputs& in, const float* state, const int64_t* s) {
  for (int64_t p = 0; p < in.dim; ++p) {
    float* row = h + p * k.states;
    if (s[3] == 1) std::memcpy(row, state + p * s[2], static_cast<size_t>(in.states) * 4);
    else
      for (int64_t n = 0; n < in.states; ++n) row[n] = state[p * s[2] + n * s[3]];
    for (int64_t n = in.states; n < k.states; ++n) row[n] = 0.f;
  }
}

void store_head(float* state, const int64_t* s, const float* h, const HeadTile& k, const SsdInputs& in) {
  for (int64_t p = 0; p < in.dim; ++p)
    for (int64_t n = 0; n < in.states; ++n) state[p * s[2] + n * s[3]] = h[p * k.states + n];
}

// A tree: the state of each row is kept for its children.
template <class T> void step_tree(const SsdStepParams& p, HeadTile& k, int64_t head, RowRange rows) {
  const int64_t m = rows.end - rows.begin, size = p.in.dim * k.states;
  float* after = static_cast<float*>(thread_scratch(1, m * size * 4));
  for (int64_t i = 0; i < m; ++i) {
    const int64_t parent = parent_of(p.parent, rows.begin, i);
    std::memcpy(after + i * size, parent < 0 ? k.h : after + parent * size, static_cast<size_t>(size) * 4);
    advance_rows<T, true>(after + i * size, k.states, k, p.in, head, {rows.begin + i, nullptr}, 1, p.y);
  }
}

template <class T> void step_head(const SsdStepParams& p, int64_t b, int64_t head) {
  const SsdInputs& in = p.in;
  const RowRange rows = rows_of(p.cu_seqlens, b, in.tokens);
  const int64_t slot = slot_of(p.slots, b, p.num_slots);
  if (slot < 0) {
    for (int64_t t = rows.begin; t < rows.end; ++t)
      std::memset(static_cast<T*>(p.y) + (t * in.heads + head) * in.dim, 0, static_cast<size_t>(in.dim) * sizeof(T));
    return;
  }
  if (rows.begin == rows.end) return;
  HeadTile k(in);
  const int64_t* s = p.state_strides;
  float* state = p.state + slot * s[0] + head * s[1];
  const SsdRows run{rows.begin, nullptr};
  if (p.update && s[3] == 1 && k.states == in.states) {  // in place: decoding is bound by reading and writing the state once
    return advance_rows<T, true>(state, s[2], k, in, head, run, rows.end - rows.begin, p.y);
  }
  load_head(k.h, k, in, state, s);
  if (p.parent) return step_tree<T>(p, k, head, rows);
  advance_rows<T, true>(k.h, k.states, k, in, head, run, rows.end - rows.begin, p.y);
  if (p.update) store_head(state, s, k.h, k, in);
}

template <class T> void replay_head(const SsdReplayParams& p, int64_t b, int64_t head) {
  const int64_t slot = slot_of(p.slots, b, p.num_slots), n = replay_count(p.rows, p.n, b, p.max_rows, p.in.tokens);
  if (slot < 0 || n == 0) return;
  HeadTile k(p.in);
  const int64_t* s = p.state_strides;
  float* state = p.state + slot * s[0] + head * s[1];
  const SsdRows run{0, p.rows + b * p.max_rows};
  if (s[3] == 1 && k.states == p.in.states) return advance_rows<T, false>(state, s[2], k, p.in, head, run, n, nullptr);
  load_head(k.h, k, p.in, state, s);
  advance_rows<T, false>(k.h, k.states, k, p.in, head, run, n, nullptr);
  store_head(state, s, k.h, k, p.in);
}

// f(sequence, head), about 10 us of work together: 32 states of a channel a nanosecond.
template <class F> void for_heads(const SsdInputs& in, int64_t batch, const F& f) {
  const int64_t grain = 160000 / ((in.tokens / (batch + 1) + 1) * (in.dim * in.states + 1)) + 1;
  dispatch_float(in.dtype, [&](auto tag) {
    parallel_for(0, batch * in.heads, even_grain(batch * in.heads, grain), [&](int64_t task) { f(tag, task / in.heads, task % in.heads); });
  });
}

}  // namespace

void ssd_step(const SsdStepParams& p) {
  for_heads(p.in, p.batch, [&](auto tag, int64_t b, int64_t head) { step_head<typename decltype(tag)::type>(p, b, head); });
}

void ssd_replay(const SsdReplayParams& p) {
  for_heads(p.in, p.batch, [&](auto tag, int64_t b, int64_t head) { replay_head<typename decltype(tag)::type>(p, b, head); });
}

}  // namespace stretto::STRETTO_ISA
