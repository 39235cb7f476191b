// What both forms of ssd.h do to their inputs and outputs. For *_cpu.cpp only.
#pragma once
#include "common/parallel.h"
#include "kernels/scan/lanes.h"
#include "kernels/scan/ssd.h"

namespace stretto::STRETTO_ISA {

STRETTO_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// `count` elements as floats; zeros up to the next multiple of 16.
template <class T> STRETTO_INLINE void widen_padded(float* out, const T* in, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    store(out + i, load_n(in + i, n));
  }
}

struct SsdRows {
  int64_t begin;
  const int32_t* list;  // null: consecutive rows
  int64_t operator[](int64_t i) const { return list ? list[i] : begin + i; }
};

// delta of `count` rows of a head; room for padded(count).
template <class T> STRETTO_INLINE void ssd_deltas(float* delta, const SsdInputs& in, int64_t head, SsdRows rows, int64_t row, int64_t count) {
  const f32x16 bias = broadcast(in.dt_bias ? in.dt_bias[head] : 0.f);
  for (int64_t i = 0; i < padded(count); ++i)
    delta[i] = i < count ? to_float(static_cast<const T*>(in.dt)[rows[row + i] * in.dt_stride + head]) : 0.f;
  for (int64_t i = 0; i < count; i += kLanes) {
    f32x16 d = load(delta + i);
    if (in.dt_bias) d = add(d, bias);
    store(delta + i, in.softplus ? softplus(d) : d);
  }
}

// One row of a head's outputs: D x and the gate, and out. sums and x: padded floats.
template <class T> STRETTO_INLINE void ssd_output(const SsdInputs& in, int64_t head, int64_t t, const float* sums, const float* x, void* y) {
  const f32x16 d = broadcast(in.d ? in.d[head] : 0.f);
  for (int64_t p = 0; p < in.dim; p += kLanes) {
    const int n = in.dim - p < kLanes ? static_cast<int>(in.dim - p) : kLanes;
    f32x16 out = load(sums + p);
    if (in.d) out = fma(d, load(x + p), out);
    if (in.z) out = mul(out, silu(load_n(static_cast<const T*>(in.z) + t * in.z_stride + head * in.dim + p, n)));
    store_n(static_cast<T*>(y) + (t * in.heads + head) * in.dim + p, out, n);
  }
}

}  // namespace stretto::STRETTO_ISA
