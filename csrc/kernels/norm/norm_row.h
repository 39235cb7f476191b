// One row of RMS norm, for the ops that contain it: rms_norm and add_rms_norm give the same bits. For *_cpu.cpp only.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

// 1 / sqrt(mean of squares + eps); squares hold one lane's sum each.
STRETTO_INLINE f32x16 rms_scale(f32x16 squares, int64_t width, float eps) {
  return broadcast(1.f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(width) + eps));
}

// out = x * weight / rms(x) + residual; residual may be null, and x or residual may be out itself.
template <class T> STRETTO_INLINE void rms_norm_row(const T* x, const float* weight, const T* residual, int64_t width, float eps, T* out) {
  const int64_t whole = width / kLanes * kLanes;
  const int tail = static_cast<int>(width - whole);
  f32x16 squares = zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const f32x16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (tail) {
    const f32x16 v = load_some(x + whole, tail);
    squares = fma(v, v, squares);
  }
  const f32x16 scale = rms_scale(squares, width, eps);
  if (!residual) {
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
    if (tail) store_some(out + whole, mul(mul(load_some(x + whole, tail), scale), load_some(weight + whole, tail)), tail);
    return;
  }
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, add(load(residual + i), mul(mul(load(x + i), scale), load(weight + i))));
  if (tail) {
    const f32x16 normed = mul(mul(load_some(x + whole, tail), scale), load_some(weight + whole, tail));
    store_some(out + whole, add(load_some(residual + whole, tail), normed), tail);
  }
}

}  // namespace stretto::STRETTO_ISA
