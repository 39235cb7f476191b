#include "kernels/scan/causal_conv1d.h"

#include "common/parallel.h"
#include "kernels/scan/lanes.h"
#include "kernels/scan/scan_rows.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr int64_t kRows = 128, kChannels = 256;  // of one task: weights are turned once for 128 rows; a row is 1 KB of floats, a few streams
constexpr int64_t kMaxWidth = 8;

// Weights and bias of a run of channels, turned so that channels are lanes.
struct Filter {
  float weight[kMaxWidth][kChannels], bias[kChannels];

  Filter(const float* w, const int64_t* strides, const float* b, int64_t width, int64_t first, int64_t count) {
    const float* from = w + first * strides[0];
    if (strides[0] == 1) {
      for (int64_t k = 0; k < width; ++k) std::memcpy(weight[k], from + k * strides[1], static_cast<size_t>(count) * 4);
    } else {
      for (int64_t c = 0; c < count; ++c)
        for (int64_t k = 0; k < width; ++k) weight[k][c] = from[c * strides[0] + k * strides[1]];
    }
    for (int64_t c = 0; c < count; ++c) bias[c] = b ? b[first + c] : 0.f;
  }
};

// One row: taps[k] are the inputs that meet weight k, `count` channels of each.
template <int kWidth, class In, class Out> void conv_row(const Filter& f, const In* const* taps, Out* y, int64_t count, bool with_silu) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int n = count - c < kLanes ? static_cast<int>(count - c) : kLanes;
    f32x16 sum = load_n(f.bias + c, n);
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) sum = fma(load_n(f.weight[k] + c, n), load_n(taps[k] + c, n), sum);
    store_n(y + c, with_silu ? silu(sum) : sum, n);
  }
}

template <class F> void dispatch_width(int64_t width, const F& f) {
  switch (width) {
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

template <class T> void widen(float* out, const T* in, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int n = count - c < kLanes ? static_cast<int>(count - c) : kLanes;
    store_n(out + c, load_n(in + c, n), n);
  }
}

// Rows [begin, end) of one sequence that starts at `first`; channels [c0, c0 + count).
template <int kWidth, class T> void conv_run(const CausalConv1dParams& p, const Filter& f, int64_t b, int64_t first, RowRange run, int64_t c0,
                                             int64_t count) {
  constexpr int64_t kBefore = kWidth - 1;
  const T* x = static_cast<const T*>(p.x) + c0;
  T* y = static_cast<T*>(p.y) + c0;
  int64_t t = run.begin;
  if (t - first < kBefore) {                           // windows that reach back before the sequence: inputs and history side by side in floats
    alignas(64) float window[2 * kBefore][kChannels];  // row i is input first - kBefore + i
    const int64_t* s = p.initial_strides;
    for (int64_t k = 0; k < kBefore; ++k)
      for (int64_t c = 0; c < count; ++c) window[k][c] = p.initial ? p.initial[b * s[0] + (c0 + c) * s[1] + k * s[2]] : 0.f;
    const int64_t last = run.end < first + kBefore ? run.end : first + kBefore;
    for (int64_t i = first; i < last; ++i) widen(window[kBefore + i - first], x + i * p.x_stride, count);
    for (; t < last; ++t) {
      const float* taps[kWidth];
      for (int k = 0; k < kWidth; ++k) taps[k] = window[t - first + k];
      conv_row<kWidth>(f, taps, y + t * p.y_stride, count, p.silu);
    }
  }
  for (; t < run.end; ++t) {
    const T* taps[kWidth];
    for (int k = 0; k < kWidth; ++k) taps[k] = x + (t - kBefore + k) * p.x_stride;
    conv_row<kWidth>(f, taps, y + t * p.y_stride, count, p.silu);
  }
}

template <int kWidth, class T> void conv_block(const CausalConv1dParams& p, int64_t r0, int64_t c0) {
  const int64_t count = p.channels - c0 < kChannels ? p.channels - c0 : kChannels, r1 = r0 + kRows < p.tokens ? r0 + kRows : p.tokens;
  const Filter f(p.weight, p.weight_strides, p.bias, p.width, c0, count);
  int64_t low = 0, high = p.batch;  // the last sequence that starts at or before r0
  while (high - low > 1) {
    const int64_t mid = (low + high) / 2;
    (p.cu_seqlens[mid] <= r0 ? low : high) = mid;
  }
  for (int64_t b = low, t = r0; t < r1; ++b) {
    const int64_t end = p.cu_seqlens[b + 1] < r1 ? p.cu_seqlens[b + 1] : r1;
    if (end > t) conv_run<kWidth, T>(p, f, b, p.cu_seqlens[b], {t, end}, c0, count);
    t = end > t ? end : t;
  }
}

template <class T> void last_inputs(const CausalConv1dParams& p, int64_t b) {
  const int64_t before = p.width - 1, first = p.cu_seqlens[b], length = p.cu_seqlens[b + 1] - first;
  const int64_t* s = p.initial_strides;
  const T* x = static_cast<const T*>(p.x);
  float* out = p.final + b * p.channels * before;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t k = 0; k < before; ++k) {
      const int64_t i = length - before + k;  // counted from the sequence's start; negative: from the initial state
      out[c * before + k] = i >= 0      ? to_float(x[(first + i) * p.x_stride + c])
                            : p.initial ? p.initial[b * s[0] + c * s[1] + (before + i) * s[2]]
                                        : 0.f;
    }
}

// Floats that a sequence's step looks at: the state's inputs, then its rows.
template <class T> void gather_window(float* window, const float* state, const int64_t* s, int64_t before, const T* x, int64_t x_stride,
                                      RowRange rows, int64_t c0, int64_t count) {
  if (s[1] == 1) {
    for (int64_t k = 0; k < before; ++k) widen(window + k * kChannels, state + c0 + k * s[2], count);
  } else {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t k = 0; k < before; ++k) window[k * kChannels + c] = state[(c0 + c) * s[1] + k * s[2]];
  }
  for (int64_t t = rows.begin; t < rows.end; ++t) widen(window + (before + t - rows.begin) * kChannels, x + t * x_stride + c0, count);
}

void scatter_state(float* state, const int64_t* s, int64_t before, const float* const* last, int64_t c0, int64_t count) {
  if (s[1] == 1) {
    for (int64_t k = 0; k < before; ++k) std::memcpy(state + c0 + k * s[2], last[k], static_cast<size_t>(count) * 4);
    return;
  }
  for (int64_t c = 0; c < count; ++c)
    for (int64_t k = 0; k < before; ++k) state[(c0 + c) * s[1] + k * s[2]] = last[k][c];
}

template <int kWidth, class T> void step_sequence(const CausalConv1dStepParams& p, int64_t b, int64_t c0) {
  constexpr int64_t kBefore = kWidth - 1;
  const int64_t count = p.channels - c0 < kChannels ? p.channels - c0 : kChannels, slot = slot_of(p.slots, b, p.num_slots);
  const RowRange rows = rows_of(p.cu_seqlens, b, p.tokens);
  const int64_t m = rows.end - rows.begin;
  T* y = static_cast<T*>(p.y) + rows.begin * p.y_stride + c0;
  if (slot < 0) {
    for (int64_t i = 0; i < m; ++i) std::memset(y + i * p.y_stride, 0, static_cast<size_t>(count) * sizeof(T));
    return;
  }
  if (m == 0) return;
  float* state = p.state + slot * p.state_strides[0];
  float* window = static_cast<float*>(thread_scratch(0, (kBefore + m) * kChannels * 4));
  gather_window(window, state, p.state_strides, kBefore, static_cast<const T*>(p.x), p.x_stride, rows, c0, count);
  const Filter f(p.weight, p.weight_strides, p.bias, kWidth, c0, count);
  const float* taps[kWidth];
  for (int64_t i = 0; i < m; ++i) {
    int64_t node = i, beyond = 0;  // beyond: how many inputs before the state's end
    for (int k = kBefore; k >= 0; --k) {
      taps[k] = node >= 0 ? window + (kBefore + node) * kChannels : window + (kBefore - 1 - beyond++) * kChannels;
      if (node >= 0) node = parent_of(p.parent, rows.begin, node);
    }
    conv_row<kWidth>(f, taps, y + i * p.y_stride, count, p.silu);
  }
  if (p.update) scatter_state(state, p.state_strides, kBefore, taps + 1, c0, count);
}

template <class T> void replay_sequence(const CausalConv1dReplayParams& p, int64_t b, int64_t c0) {
  const int64_t before = p.width - 1, slot = slot_of(p.slots, b, p.num_slots), n = replay_count(p.rows, p.n, b, p.max_rows, p.inputs);
  if (slot < 0 || n == 0) return;
  const int64_t count = p.channels - c0 < kChannels ? p.channels - c0 : kChannels;
  alignas(64) float window[2 * (kMaxWidth - 1)][kChannels];  // old state, then the last inputs
  float* state = p.state + slot * p.state_strides[0];
  gather_window(window[0], state, p.state_strides, before, static_cast<const T*>(p.x), p.x_stride, {0, 0}, c0, count);
  const int64_t kept = n < before ? n : before;
  for (int64_t i = 0; i < kept; ++i)
    widen(window[before + i], static_cast<const T*>(p.x) + p.rows[b * p.max_rows + n - kept + i] * p.x_stride + c0, count);
  const float* last[kMaxWidth - 1];
  for (int64_t k = 0; k < before; ++k) last[k] = window[kept + k];
  scatter_state(state, p.state_strides, before, last, c0, count);
}

int64_t channel_blocks(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

}  // namespace

void causal_conv1d(const CausalConv1dParams& p) {
  const int64_t blocks = channel_blocks(p.channels);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_width(p.width, [&]<int kWidth>() {
      parallel_for(0, (p.tokens + kRows - 1) / kRows * blocks, 1,
                   [&](int64_t task) { conv_block<kWidth, T>(p, task / blocks * kRows, task % blocks * kChannels); });
    });
    parallel_for(0, p.batch, 4096 / (p.channels + 1) + 1, [&](int64_t b) { last_inputs<T>(p, b); });
  });
}

void causal_conv1d_step(const CausalConv1dStepParams& p) {
  const int64_t blocks = channel_blocks(p.channels), grain = 24 * p.batch / (p.tokens + 1) + 1;  // about 10 us: a few hand-overs
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_width(p.width, [&]<int kWidth>() {
      parallel_for(0, p.batch * blocks, even_grain(p.batch * blocks, grain),
                   [&](int64_t task) { step_sequence<kWidth, T>(p, task / blocks, task % blocks * kChannels); });
    });
  });
}

void causal_conv1d_replay(const CausalConv1dReplayParams& p) {
  const int64_t blocks = channel_blocks(p.channels);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.batch * blocks, even_grain(p.batch * blocks, 24),
                 [&](int64_t task) { replay_sequence<T>(p, task / blocks, task % blocks * kChannels); });
  });
}

}  // namespace stretto::STRETTO_ISA
