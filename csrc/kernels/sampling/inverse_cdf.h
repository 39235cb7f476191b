// Inverse of a running sum over non-negative weights, float or double. For *_cpu.cpp only.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

inline constexpr int64_t kSumChunk = 512;

// Sum of w[0, n) in eight double lanes and a fixed tree; -1 where an entry is negative, NaN or infinite. The second accumulator
// stays 0 unless such an entry is there: min(w, 0) keeps a negative, NaN comes through either, w - w is NaN for an infinity.
template <class T> static inline double weight_sum(const T* w, int64_t n) {
  double lanes[8] = {}, bad[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) {
      const double x = static_cast<double>(w[i + k]);
      lanes[k] += x;
      bad[k] += (x < 0 ? 1.0 : 0.0) + (x - x);
    }
  for (int k = 0; i < n; ++i, ++k) {
    const double x = static_cast<double>(w[i]);
    lanes[k] += x;
    bad[k] += (x < 0 ? 1.0 : 0.0) + (x - x);
  }
  double wrong = 0;
  for (int k = 0; k < 8; ++k) wrong += bad[k];
  if (wrong != 0) return -1;
  for (int half = 4; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

// Sum over the row, chunk by chunk; -1 where it is no row of weights.
template <class T> static inline double row_sum(const T* w, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kSumChunk) {
    const double chunk = weight_sum(w + i, n - i < kSumChunk ? n - i : kSumChunk);
    if (chunk < 0) return -1;
    total += chunk;
  }
  return total;
}

// The first index whose running sum exceeds u * total, u in [0, 1); an index of positive weight always. total = row_sum(w, n) > 0.
template <class T> static inline int32_t inverse_cdf(const T* w, int64_t n, double total, double u) {
  const double target = u * total;
  double before = 0;
  int64_t last = -1;
  for (int64_t i = 0; i < n; i += kSumChunk) {
    const int64_t end = n - i < kSumChunk ? n : i + kSumChunk;
    const double chunk = weight_sum(w + i, end - i);
    if (before + chunk > target || end == n) {
      double sum = before;
      for (int64_t j = i; j < end; ++j) {
        if (!(w[j] > 0)) continue;
        last = j;
        if ((sum += static_cast<double>(w[j])) > target) return static_cast<int32_t>(j);
      }
      if (end < n && last >= i) return static_cast<int32_t>(last);  // chunk and running sum round differently
    }
    before += chunk;
  }
  if (last < 0)  // the last chunk holds nothing and rounding hid the end: the last token with weight
    for (int64_t j = n - 1; j >= 0 && last < 0; --j)
      if (w[j] > 0) last = j;
  return static_cast<int32_t>(last);
}

}  // namespace stretto::STRETTO_ISA
