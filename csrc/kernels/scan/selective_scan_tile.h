// The recurrence of selective_scan.h on 16 channels and a tile of rows: what sequence, step, replay and backward are made of.
// For *_cpu.cpp only.
#pragma once
#include "kernels/scan/lanes.h"
#include "kernels/scan/selective_scan.h"

namespace stretto::STRETTO_ISA {

constexpr int64_t kTileRows = 64;  // delta, delta u and y of 16 channels and B, C of 16 states: 20 KB, inside L1
// States whose recurrence runs in registers: 16 registers of state leave room for a factor and its polynomial.
#if defined(STRETTO_ISA_avx512)
constexpr int kStateBlock = 16;
#else
constexpr int kStateBlock = 4;
#endif

struct ScanTile { alignas(64) float delta[kTileRows * kLanes], du[kTileRows * kLanes], y[kTileRows * kLanes]; };

// Which rows of the inputs a sequence takes: consecutive ones, or those of a list.
struct ScanRows {
  int64_t begin;
  const int32_t* list;
  int64_t operator[](int64_t i) const { return list ? list[i] : begin + i; }
};

// Up to 16 channels of one group.
struct ScanBlock {
  int64_t first;
  int lanes;
  float* a;        // [states][16]: A log2 e
  f32x16 largest;  // |A log2 e|, infinity where one of them is no number
};

STRETTO_INLINE ScanBlock scan_block(const SelectiveScanInputs& in, int64_t first, int lanes, float* a) {
  load_columns(a, in.a + first * in.a_strides[0], in.a_strides[0], in.a_strides[1], lanes, in.states);
  const f32x16 log2e = broadcast(1.44269504088896341f), infinity = broadcast(__builtin_inff());
  f32x16 largest = zero();
  bool numbers = true;
  for (int64_t n = 0; n < in.states; ++n) {
    const f32x16 x = mul(load(a + n * kLanes), log2e), size = max(x, sub(zero(), x));
    store(a + n * kLanes, x);
    largest = max(largest, size);
    numbers = numbers && mask_ge(infinity, size) == 0xffff;
  }
  return {first, lanes, a, numbers ? largest : infinity};
}

// delta and delta u of `count` rows. Returns whether all factors lie in the range of decay_in_range.
template <class T> STRETTO_INLINE bool scan_inputs(const SelectiveScanInputs& in, const ScanBlock& k, ScanRows rows, int64_t row, int64_t count,
                                                   ScanTile& tile) {
  const T *u = static_cast<const T*>(in.u) + k.first, *dt = static_cast<const T*>(in.dt) + k.first;
  const f32x16 bias = in.dt_bias ? load_n(in.dt_bias + k.first, k.lanes) : zero(), limit = broadcast(125.f);
  uint32_t inside = 0xffff;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = rows[row + i];
    f32x16 delta = load_n(dt + t * in.dt_stride, k.lanes);
    if (in.dt_bias) delta = add(delta, bias);
    if (in.softplus) delta = softplus(delta);
    inside &= mask_ge(limit, mul(k.largest, max(delta, sub(zero(), delta))));
    store(tile.delta + i * kLanes, delta);
    store(tile.du + i * kLanes, mul(delta, load_n(u + t * in.u_stride, k.lanes)));
  }
  return inside == 0xffff;
}

// B or C of `count` rows of a group, as floats.
template <class T> STRETTO_INLINE void scan_vectors(float* out, const void* from, int64_t stride, int64_t group, int64_t states, ScanRows rows,
                                                    int64_t row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T* x = static_cast<const T*>(from) + rows[row + i] * stride + group * states;
    for (int64_t n = 0; n < states; n += kLanes) {
      const int some = states - n < kLanes ? static_cast<int>(states - n) : kLanes;
      store_n(out + i * states + n, load_n(x + n, some), some);
    }
  }
}

// kBlock states over `count` rows. y is added to, so states ascend within a row.
template <int kBlock, bool kInRange, bool kOutput>
STRETTO_INLINE void scan_states(float* h, const float* a, const ScanTile& tile, const float* b, const float* c, float* y, int64_t count,
                                int64_t states) {
  f32x16 state[kBlock];
#pragma GCC unroll 16
  for (int n = 0; n < kBlock; ++n) state[n] = load(h + n * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const f32x16 delta = load(tile.delta + i * kLanes), du = load(tile.du + i * kLanes);
    f32x16 sum = kOutput ? load(y + i * kLanes) : zero();
#pragma GCC unroll 16
    for (int n = 0; n < kBlock; ++n) {
      const f32x16 rate = load(a + n * kLanes), factor = kInRange ? decay_in_range(delta, rate) : decay(delta, rate);
      state[n] = fma(factor, state[n], mul(du, broadcast(b[i * states + n])));
      if (kOutput) sum = fma(broadcast(c[i * states + n]), state[n], sum);
    }
    if (kOutput) store(y + i * kLanes, sum);
  }
#pragma GCC unroll 16
  for (int n = 0; n < kBlock; ++n) store(h + n * kLanes, state[n]);
}

template <bool kInRange, bool kOutput>
STRETTO_INLINE void scan_all_states(float* h, const float* a, ScanTile& tile, const float* b, const float* c, int64_t count, int64_t states) {
  int64_t n = 0;
  for (; n + kStateBlock <= states; n += kStateBlock)
    scan_states<kStateBlock, kInRange, kOutput>(h + n * kLanes, a + n * kLanes, tile, b + n, c + n, tile.y, count, states);
  for (; n < states; ++n) scan_states<1, kInRange, kOutput>(h + n * kLanes, a + n * kLanes, tile, b + n, c + n, tile.y, count, states);
}

// The rows of a tile, whose inputs are ready: h [states][16] advances, and tile.y becomes sum_n C h where kOutput.
template <bool kOutput> static void scan_tile(float* h, const float* a, ScanTile& tile, const float* b, const float* c, int64_t count, int64_t states,
                                              bool in_range) {
  if (kOutput) std::memset(tile.y, 0, static_cast<size_t>(count) * kLanes * 4);
  in_range ? scan_all_states<true, kOutput>(h, a, tile, b, c, count, states) : scan_all_states<false, kOutput>(h, a, tile, b, c, count, states);
}

// D u and the gate, and out.
template <class T>
STRETTO_INLINE void scan_outputs(const SelectiveScanInputs& in, const ScanBlock& k, ScanRows rows, int64_t row, int64_t count, const ScanTile& tile,
                                 void* y, int64_t y_stride) {
  const f32x16 d = in.d ? load_n(in.d + k.first, k.lanes) : zero();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = rows[row + i];
    f32x16 out = load(tile.y + i * kLanes);
    if (in.d) out = fma(d, load_n(static_cast<const T*>(in.u) + t * in.u_stride + k.first, k.lanes), out);
    if (in.z) out = mul(out, silu(load_n(static_cast<const T*>(in.z) + t * in.z_stride + k.first, k.lanes)));
    store_n(static_cast<T*>(y) + t * y_stride + k.first, out, k.lanes);
  }
}

}  // namespace stretto::STRETTO_ISA
