#include "kernels/dct/dct_separable.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

// Pairs of outputs in registers at once, for kVecs vectors of lanes: 16 accumulators of 32 registers, or 8 of 16 with AVX2.
#if defined(STRETTO_ISA_avx512)
static constexpr int kPairs = 4, kVecs = 2;
#else
static constexpr int kPairs = 2, kVecs = 1;
#endif

struct Line {  // one line of the grid, for `channels` channels
  const DctAxis* axis;
  int64_t in_step, out_step;  // elements between neighbours
  int64_t channels, pitch;    // pitch: channels rounded up to whole vectors, the row length of `halves`
  bool fold_in, fold_out;
};

template <class T> STRETTO_INLINE f32x16 load_lanes(const T* p, int64_t lanes) {
  return lanes >= kLanes ? load(p) : load_some(p, static_cast<int>(lanes));
}
template <class T> STRETTO_INLINE void store_lanes(T* p, f32x16 a, int64_t lanes) {
  if (lanes >= kLanes) store(p, a);
  else store_some(p, a, static_cast<int>(lanes));
}

// The line as sums and differences: s_0, d_0, s_1, d_1, ... in rows of `halves`, which stay in L1 while they are multiplied.
// Neighbours are often 4 KB apart, all in one set of L1: this reads each of them once, in runs. `ahead` is this place of a coming line.
template <class In> static void split_line(const Line& line, const In* in, const In* ahead, float* halves) {
  constexpr int64_t kCacheLine = 64 / sizeof(In);
  const int64_t n = line.axis->in, pairs = n / 2;
  for (int64_t j = 0; j < (n + 1) / 2; ++j) {
    const int64_t first = line.fold_in ? j : 2 * j, second = line.fold_in ? n - 1 - j : 2 * j + 1;
    const In *a = in + first * line.in_step, *b = in + second * line.in_step;
    float *s = halves + 2 * j * line.pitch, *d = s + line.pitch;
    if (ahead)
      for (int64_t c = 0; c < line.channels; c += kCacheLine) {
        __builtin_prefetch(ahead + first * line.in_step + c, 0, 2);
        if (j < pairs) __builtin_prefetch(ahead + second * line.in_step + c, 0, 2);
      }
    if (j == pairs) {  // the middle of an odd line
      for (int64_t c = 0; c < line.channels; c += kLanes) store(s + c, load_lanes(a + c, line.channels - c));
    } else if (line.fold_in) {
      for (int64_t c = 0; c < line.channels; c += kLanes) {
        const f32x16 left = load_lanes(a + c, line.channels - c), right = load_lanes(b + c, line.channels - c);
        store(s + c, add(left, right));
        store(d + c, sub(left, right));
      }
    } else {
      for (int64_t c = 0; c < line.channels; c += kLanes) {
        store(s + c, load_lanes(a + c, line.channels - c));
        store(d + c, load_lanes(b + c, line.channels - c));
      }
    }
  }
}

// Outputs first .. first + kPairs - 1 of either half, for kV vectors from channel c on.
template <int kV, class Out> STRETTO_INLINE void multiply(const Line& line, const float* halves, Out* out, int64_t c, int64_t first) {
  const DctAxis& axis = *line.axis;
  f32x16 e[kPairs][kV], o[kPairs][kV];
  for (auto& row : e)
    for (auto& v : row) v = zero();
  for (auto& row : o)
    for (auto& v : row) v = zero();
  const float *even = axis.even + first, *odd = axis.odd + first, *s = halves + c;
  for (int64_t j = 0; j < axis.in / 2; ++j, even += axis.pitch, odd += axis.pitch, s += 2 * line.pitch) {
    f32x16 sum[kV], difference[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
      sum[v] = load(s + v * kLanes);
      difference[v] = load(s + line.pitch + v * kLanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const f32x16 of_sum = broadcast(even[i]), of_difference = broadcast(odd[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) {
        e[i][v] = fma(of_sum, sum[v], e[i][v]);
        o[i][v] = fma(of_difference, difference[v], o[i][v]);
      }
    }
  }
  if (axis.in & 1) {
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) e[i][v] = fma(broadcast(even[i]), load(s + v * kLanes), e[i][v]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    const int64_t at = first + i;
    const bool has_even = 2 * at < axis.out, has_odd = 2 * at + 1 < axis.out;
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
      Out* to = out + c + v * kLanes;
      const int64_t lanes = line.channels - c - v * kLanes;
      if (!line.fold_out) {
        if (has_even) store_lanes(to + 2 * at * line.out_step, e[i][v], lanes);
        if (has_odd) store_lanes(to + (2 * at + 1) * line.out_step, o[i][v], lanes);
      } else if (has_odd) {
        store_lanes(to + at * line.out_step, add(e[i][v], o[i][v]), lanes);
        store_lanes(to + (axis.out - 1 - at) * line.out_step, sub(e[i][v], o[i][v]), lanes);
      } else if (has_even) {
        store_lanes(to + at * line.out_step, e[i][v], lanes);
      }
    }
  }
}

template <class In, class Out> static void transform_line(const Line& line, const In* in, const In* ahead, float* halves, Out* out) {
  split_line(line, in, ahead, halves);
  const int64_t half = (line.axis->out + 1) / 2;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= line.channels; c += kVecs * kLanes)
    for (int64_t first = 0; first < half; first += kPairs) multiply<kVecs>(line, halves, out, c, first);
  for (; c < line.channels; c += kLanes)
    for (int64_t first = 0; first < half; first += kPairs) multiply<1>(line, halves, out, c, first);
}

template <class T> static void transform_block(const DctSeparableParams& p, int64_t image, int64_t first_channel, int64_t channels) {
  constexpr int64_t kAhead = 2;  // lines between a cache line being asked for and read: about 1 us of work
  const T* x = static_cast<const T*>(p.x) + image * p.x_batch_stride + first_channel;
  T* out = static_cast<T*>(p.out) + image * p.out_batch_stride + first_channel;
  const int64_t pitch = (channels + kLanes - 1) / kLanes * kLanes, row = p.inner.out * pitch;
  const int64_t longest = p.inner.in > p.outer.in ? p.inner.in : p.outer.in;
  float* half_done = static_cast<float*>(thread_scratch(0, p.outer.in * row * static_cast<int64_t>(sizeof(float))));
  float* halves = static_cast<float*>(thread_scratch(1, longest * pitch * static_cast<int64_t>(sizeof(float))));
  const Line inner{&p.inner, p.inner.x_stride, pitch, channels, pitch, p.fold_in, p.fold_out};
  for (int64_t i = 0; i < p.outer.in; ++i) {
    const T* ahead = i + kAhead < p.outer.in ? x + (i + kAhead) * p.outer.x_stride : nullptr;
    transform_line(inner, x + i * p.outer.x_stride, ahead, halves, half_done + i * row);
  }
  const Line outer{&p.outer, row, p.outer.out_stride, channels, pitch, p.fold_in, p.fold_out};
  for (int64_t v = 0; v < p.inner.out; ++v) transform_line<float, T>(outer, half_done + v * pitch, nullptr, halves, out + v * p.inner.out_stride);
}

void dct_separable(const DctSeparableParams& p) {
  int64_t block = 128;  // channels to a task: as many as keep the half-transformed lines within 256 KB, and whole cache lines
  while (block > 2 * kLanes && p.outer.in * p.inner.out * block > 65536) block /= 2;
  const int64_t blocks = (p.channels + block - 1) / block;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.batch * blocks, 1, [&](int64_t task) {
      const int64_t first = task % blocks * block;
      transform_block<T>(p, task / blocks, first, p.channels - first < block ? p.channels - first : block);
    });
  });
}

}  // namespace stretto::STRETTO_ISA
