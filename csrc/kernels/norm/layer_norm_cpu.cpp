#include "kernels/norm/layer_norm.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

constexpr int kChains = 4;  // sums in flight: an addition waits four cycles for the one before it

// Sum over the row of term(vector, lanes in use); term gives 0 in lanes that are not in use.
template <class T, class Term> STRETTO_INLINE float sum_row(const T* x, int64_t width, const Term& term) {
  f32x16 sums[kChains];
  for (f32x16& s : sums) s = zero();
  int64_t i = 0;
  for (; i + kChains * kLanes <= width; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) sums[c] = add(sums[c], term(load(x + i + c * kLanes), kLanes));
  for (; i + kLanes <= width; i += kLanes) sums[0] = add(sums[0], term(load(x + i), kLanes));
  if (i < width) {
    const int tail = static_cast<int>(width - i);
    sums[1] = add(sums[1], term(load_some(x + i, tail), tail));
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class T> static void layer_norm_row(const LayerNormParams& p, const T* x, T* out) {
  const float n = static_cast<float>(p.width);
  const f32x16 mean = broadcast(sum_row(x, p.width, [](f32x16 v, int) { return v; }) / n);
  const float squares = sum_row(x, p.width, [&](f32x16 v, int lanes) {
    const f32x16 d = sub(v, mean), square = mul(d, d);
    if (lanes == kLanes) return square;
    float values[kLanes];
    store(values, square);
    return load_some(values, lanes);
  });
  const f32x16 scale = broadcast(1.f / __builtin_sqrtf(squares / n + p.eps));
  const int64_t whole = p.width / kLanes * kLanes;
  const int tail = static_cast<int>(p.width - whole);
  const float *weight = p.weight, *bias = p.bias;
  if (bias) {
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, fma(mul(sub(load(x + i), mean), scale), load(weight + i), load(bias + i)));
  } else {
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, mul(mul(sub(load(x + i), mean), scale), load(weight + i)));
  }
  if (!tail) return;
  const f32x16 normed = mul(sub(load_some(x + whole, tail), mean), scale), w = load_some(weight + whole, tail);
  store_some(out + whole, bias ? fma(normed, w, load_some(bias + whole, tail)) : mul(normed, w), tail);
}

void layer_norm(const LayerNormParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const int64_t grain = 16384 / (p.width + 1) + 1;  // about 64 KB of floats a task: several times the hand-over
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, rows, grain,
                 [&](int64_t row) { layer_norm_row(p, static_cast<const T*>(p.x) + row * p.x_stride, static_cast<T*>(p.out) + row * p.out_stride); });
  });
}

}  // namespace stretto::STRETTO_ISA
