#include "kernels/norm/rms_norm.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

template <class T> static void rms_norm_row(const RmsNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const int64_t whole = p.width / kLanes * kLanes;
  const int tail = static_cast<int>(p.width - whole);
  f32x16 squares = zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const f32x16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (tail) {
    const f32x16 v = load_some(x + whole, tail);
    squares = fma(v, v, squares);
  }
  const f32x16 scale = broadcast(1.f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(p.width) + p.eps));
  const T* residual = static_cast<const T*>(p.residual);
  if (!residual) {
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(p.weight + i)));
    if (tail) store_some(out + whole, mul(mul(load_some(x + whole, tail), scale), load_some(p.weight + whole, tail)), tail);
    return;
  }
  residual += row * p.residual_stride;
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, add(load(residual + i), mul(mul(load(x + i), scale), load(p.weight + i))));
  if (tail) {
    const f32x16 normed = mul(mul(load_some(x + whole, tail), scale), load_some(p.weight + whole, tail));
    store_some(out + whole, add(load_some(residual + whole, tail), normed), tail);
  }
}

void rms_norm(const RmsNormParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const int64_t grain = 16384 / (p.width + 1) + 1;  // about 64 KB of floats a task: several times the hand-over
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, rows, grain, [&](int64_t row) { rms_norm_row<T>(p, row); });
  });
}

}  // namespace stretto::STRETTO_ISA
