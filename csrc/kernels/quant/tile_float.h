// The micro-kernel for float weights: 16 G outputs x R rows. The running sum moves to a total after every 256 k, for every R alike:
// a chain of 8192 additions in float would lose two more digits.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

inline constexpr int64_t kFlush = 256;

// sums[g * sums_stride + 16 r + lane] for the G groups at `panel`, each [k][16] of T. Of the R rows `rows` exist; the others repeat the last.
template <class T, int R, int G>
static void float_tile(const T* panel, int64_t k, const float* x, int64_t x_stride, int64_t rows, float* sums, int64_t sums_stride) {
  const float* xs[R];
  for (int r = 0; r < R; ++r) xs[r] = x + (r < rows ? r : rows - 1) * x_stride;
  for (int64_t k0 = 0; k0 < k; k0 += kFlush) {
    const int64_t last = k0 + kFlush < k ? k0 + kFlush : k;
    f32x16 acc[G][R];
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) acc[g][r] = zero();
    for (int64_t i = k0; i < last; ++i) {
      f32x16 w[G];
      for (int g = 0; g < G; ++g) w[g] = load(panel + 16 * (g * k + i));
      for (int r = 0; r < R; ++r) {
        const f32x16 v = broadcast(xs[r][i]);
        for (int g = 0; g < G; ++g) acc[g][r] = fma(w[g], v, acc[g][r]);
      }
    }
    for (int g = 0; g < G; ++g)
      for (int r = 0; r < R; ++r) {
        float* total = sums + g * sums_stride + 16 * r;
        store(total, k0 == 0 ? acc[g][r] : add(load(total), acc[g][r]));
      }
  }
}

}  // namespace stretto::STRETTO_ISA
