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

template <bool kFull, class T> STRETTO_INLINE f32x16 load_lanes(const T* p, int lanes) { return kFull ? load(p) : load_some(p, lanes); }
template <bool kFull, class T> STRETTO_INLINE void store_lanes(T* p, f32x16 a, int lanes) {
  if (kFull) store(p, a);
  else store_some(p, a, lanes);
}

struct Line {  // one line of the grid, for some lanes of its channels
  const DctAxis* axis;
  int64_t in_step, out_step;  // elements between neighbours
  bool fold_in, fold_out;
  int lanes;  // of the last channels, where they do not fill a vector
};

// Outputs first .. first + kPairs - 1 of either half.
template <int kV, bool kFull, class In, class Out> STRETTO_INLINE void transform_pairs(const Line& line, const In* in, Out* out, int64_t first) {
  const DctAxis& axis = *line.axis;
  const int64_t pairs = axis.in / 2;
  f32x16 e[kPairs][kV], o[kPairs][kV];
  for (auto& row : e)
    for (auto& v : row) v = zero();
  for (auto& row : o)
    for (auto& v : row) v = zero();
  const float *even = axis.even + first, *odd = axis.odd + first;
  for (int64_t j = 0; j < pairs; ++j, even += axis.pitch, odd += axis.pitch) {
    const In* a = in + (line.fold_in ? j : 2 * j) * line.in_step;
    const In* b = in + (line.fold_in ? axis.in - 1 - j : 2 * j + 1) * line.in_step;
    f32x16 s[kV], d[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
      s[v] = load_lanes<kFull>(a + v * kLanes, line.lanes);
      d[v] = load_lanes<kFull>(b + v * kLanes, line.lanes);
      if (line.fold_in) {
        const f32x16 sum = add(s[v], d[v]);
        d[v] = sub(s[v], d[v]);
        s[v] = sum;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const f32x16 of_sum = broadcast(even[i]), of_difference = broadcast(odd[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) {
        e[i][v] = fma(of_sum, s[v], e[i][v]);
        o[i][v] = fma(of_difference, d[v], o[i][v]);
      }
    }
  }
  if (axis.in & 1) {
    const In* middle = in + (line.fold_in ? pairs : axis.in - 1) * line.in_step;
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i)
      for (int v = 0; v < kV; ++v) e[i][v] = fma(broadcast(even[i]), load_lanes<kFull>(middle + v * kLanes, line.lanes), e[i][v]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i) {
    const int64_t at = first + i, mirror = axis.out - 1 - at;
    const bool has_even = 2 * at < axis.out, has_odd = 2 * at + 1 < axis.out;
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) {
      Out* to = out + v * kLanes;
      if (!line.fold_out) {
        if (has_even) store_lanes<kFull>(to + 2 * at * line.out_step, e[i][v], line.lanes);
        if (has_odd) store_lanes<kFull>(to + (2 * at + 1) * line.out_step, o[i][v], line.lanes);
      } else if (has_odd) {
        store_lanes<kFull>(to + at * line.out_step, add(e[i][v], o[i][v]), line.lanes);
        store_lanes<kFull>(to + mirror * line.out_step, sub(e[i][v], o[i][v]), line.lanes);
      } else if (has_even) {
        store_lanes<kFull>(to + at * line.out_step, e[i][v], line.lanes);
      }
    }
  }
}

// One line for `channels` channels. `ahead`: the same place of the next line, whose cache lines are asked for meanwhile, or null.
template <class In, class Out>
static void transform_line(Line line, const In* in, Out* out, int64_t channels, const In* ahead) {
  const int64_t half = (line.axis->out + 1) / 2;
  int64_t c = 0;
  for (; c + kVecs * kLanes <= channels; c += kVecs * kLanes) {
    if (ahead)
      for (int64_t j = 0; j < line.axis->in; ++j)
        for (int64_t at = 0; at < kVecs * kLanes; at += 64 / static_cast<int64_t>(sizeof(In))) __builtin_prefetch(ahead + j * line.in_step + c + at);
    for (int64_t first = 0; first < half; first += kPairs) transform_pairs<kVecs, true>(line, in + c, out + c, first);
  }
  for (; c + kLanes <= channels; c += kLanes)
    for (int64_t first = 0; first < half; first += kPairs) transform_pairs<1, true>(line, in + c, out + c, first);
  line.lanes = static_cast<int>(channels - c);
  if (line.lanes)
    for (int64_t first = 0; first < half; first += kPairs) transform_pairs<1, false>(line, in + c, out + c, first);
}

template <class T> static void transform_block(const DctSeparableParams& p, int64_t image, int64_t first_channel, int64_t channels) {
  const T* x = static_cast<const T*>(p.x) + image * p.x_batch_stride + first_channel;
  T* out = static_cast<T*>(p.out) + image * p.out_batch_stride + first_channel;
  const int64_t pitch = (channels + kLanes - 1) / kLanes * kLanes, row = p.inner.out * pitch;
  float* half = static_cast<float*>(thread_scratch(0, p.outer.in * row * static_cast<int64_t>(sizeof(float))));
  const Line inner{&p.inner, p.inner.x_stride, pitch, p.fold_in, p.fold_out, kLanes};
  for (int64_t i = 0; i < p.outer.in; ++i) {
    const T* ahead = i + 1 < p.outer.in ? x + (i + 1) * p.outer.x_stride : nullptr;
    transform_line(inner, x + i * p.outer.x_stride, half + i * row, channels, ahead);
  }
  const Line outer{&p.outer, row, p.outer.out_stride, p.fold_in, p.fold_out, kLanes};
  for (int64_t v = 0; v < p.inner.out; ++v) transform_line<float, T>(outer, half + v * pitch, out + v * p.inner.out_stride, channels, nullptr);
}

void dct_separable(const DctSeparableParams& p) {
  if (p.outer.out == 0 || p.inner.out == 0) return;
  int64_t block = 128;  // channels to a task: as many as keep the half-transformed lines within 256 KB, and whole cache lines
  while (block > kLanes && p.outer.in * p.inner.out * block > 65536) block /= 2;
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
