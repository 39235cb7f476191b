#include "common/parallel.h"
#include "kernels/scan/lanes.h"
#include "kernels/scan/scan_backward.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr int64_t kRows = 64, kMaxBefore = 7;

// 16 channels of one sequence, row i counted from its start; rows before it come from `initial`, rows behind it are zero.
template <class T> struct Lane {
  const CausalConv1dBackwardParams& p;
  int64_t b, first, length, c0;
  int lanes;

  f32x16 input(int64_t i) const {
    if (i >= 0) return i < length ? load_n(static_cast<const T*>(p.in.x) + (first + i) * p.in.x_stride + c0, lanes) : zero();
    const int64_t* s = p.in.initial_strides;
    float values[kLanes] = {};
    if (p.in.initial)
      for (int l = 0; l < lanes; ++l) values[l] = p.in.initial[b * s[0] + (c0 + l) * s[1] + (p.in.width - 1 + i) * s[2]];
    return load(values);
  }
  f32x16 grad(int64_t i) const { return load_n(static_cast<const T*>(p.dy) + (first + i) * p.dy_stride + c0, lanes); }
};

// d silu(s) / ds = g (1 + s (1 - g)), g = sigmoid(s)
f32x16 silu_slope(f32x16 s) {
  const f32x16 g = sigmoid(s);
  return mul(g, fma(s, sub(broadcast(1.f), g), broadcast(1.f)));
}

template <class T> void backward_sequence(const Lane<T>& k, const f32x16* weight, f32x16 bias, f32x16* dweight, f32x16& dbias) {
  const CausalConv1dBackwardParams& p = k.p;
  const int64_t width = p.in.width, before = width - 1;
  f32x16 x[kRows + 2 * kMaxBefore], g[kRows + kMaxBefore];
  const float* dfinal = p.dfinal + (k.b * p.in.channels + k.c0) * before;
  // Inputs -before .. length - 1; a tile's gradients come from the outputs of its rows and of the `before` rows behind it.
  for (int64_t begin = -before; begin < k.length; begin += kRows) {
    const int64_t end = begin + kRows < k.length ? begin + kRows : k.length, last = end + before < k.length ? end + before : k.length;
    const int64_t out = begin < 0 ? 0 : begin;  // the first output that sees an input of the tile
    for (int64_t i = out - before; i < last; ++i) x[i - (out - before)] = k.input(i);
    f32x16 dw[8], db = zero();  // of the tile: sums of sums err less
    for (int64_t j = 0; j < width; ++j) dw[j] = zero();
    for (int64_t t = out; t < last; ++t) {
      f32x16 slope = broadcast(1.f);
      if (p.in.silu) {
        f32x16 sum = bias;
        for (int64_t j = 0; j < width; ++j) sum = fma(weight[j], x[t - out + j], sum);
        slope = silu_slope(sum);
      }
      g[t - out] = mul(k.grad(t), slope);
      if (t >= end) continue;  // the next tile's
      db = add(db, g[t - out]);
      for (int64_t j = 0; j < width; ++j) dw[j] = fma(g[t - out], x[t - out + j], dw[j]);
    }
    dbias = add(dbias, db);
    for (int64_t j = 0; j < width; ++j) dweight[j] = add(dweight[j], dw[j]);
    for (int64_t i = begin; i < end; ++i) {
      f32x16 sum = zero();
      for (int64_t j = width - 1; j >= 0; --j) {
        const int64_t t = i + before - j;
        if (t >= 0 && t < last) sum = fma(weight[j], g[t - out], sum);
      }
      const int64_t kept = i - (k.length - before);  // its place in `final`
      if (kept >= 0) {
        float values[kLanes] = {};
        for (int l = 0; l < k.lanes; ++l) values[l] = dfinal[l * before + kept];
        sum = add(sum, load(values));
      }
      if (i >= 0) {
        store_n(static_cast<T*>(p.dx) + (k.first + i) * p.in.channels + k.c0, sum, k.lanes);
      } else {
        float values[kLanes];
        store(values, sum);
        for (int l = 0; l < k.lanes; ++l) p.dinitial[(k.b * p.in.channels + k.c0 + l) * before + before + i] = values[l];
      }
    }
  }
}

template <class T> void backward_block(const CausalConv1dBackwardParams& p, int64_t c0) {
  const int64_t width = p.in.width;
  const int lanes = p.in.channels - c0 < kLanes ? static_cast<int>(p.in.channels - c0) : kLanes;
  float turned[8 * kLanes];
  load_columns(turned, p.in.weight + c0 * p.in.weight_strides[0], p.in.weight_strides[0], p.in.weight_strides[1], lanes, width);
  f32x16 weight[8], dweight[8], dbias = zero();
  for (int64_t j = 0; j < width; ++j) weight[j] = load(turned + j * kLanes), dweight[j] = zero();
  const f32x16 bias = p.in.bias ? load_n(p.in.bias + c0, lanes) : zero();
  for (int64_t b = 0; b < p.in.batch; ++b) {
    const int64_t first = p.in.cu_seqlens[b];
    backward_sequence<T>({p, b, first, p.in.cu_seqlens[b + 1] - first, c0, lanes}, weight, bias, dweight, dbias);
  }
  for (int64_t j = 0; j < width; ++j) store(turned + j * kLanes, dweight[j]);
  store_columns(p.dweight + c0 * width, turned, width, 1, lanes, width);
  store_n(p.dbias + c0, dbias, lanes);
}

}  // namespace

void causal_conv1d_backward(const CausalConv1dBackwardParams& p) {
  dispatch_float(p.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, (p.in.channels + kLanes - 1) / kLanes, 1, [&](int64_t block) { backward_block<T>(p, block * kLanes); });
  });
}

}  // namespace stretto::STRETTO_ISA
