#include "kernels/moe/permute_rows.h"

#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

void permute_rows(const PermuteRowsParams& p) {
  if (p.row_bytes == 0) return;                         // an empty tensor may have no address, and memcpy wants one even for no bytes
  const int64_t grain = 65536 / (p.row_bytes + 1) + 1;  // about 64 KB a task
  parallel_for(0, p.rows, grain, [&](int64_t i) {
    const int64_t token = p.pairs[i] < 0 ? -1 : p.pairs[i] / p.k;
    char* out = static_cast<char*>(p.out) + i * p.row_bytes;
    if (token >= 0 && token < p.tokens) std::memcpy(out, static_cast<const char*>(p.x) + token * p.x_stride_bytes, static_cast<size_t>(p.row_bytes));
    else std::memset(out, 0, static_cast<size_t>(p.row_bytes));
  });
}

// Columns [first, first + kVecs * 16) of one token; lanes < 16 only for the last columns of a row.
template <int kVecs, bool kFull, class T>
STRETTO_INLINE void weighted_sum(const UnpermuteRowsParams& p, int64_t token, int64_t first, int lanes) {
  f32x16 sums[kVecs];
  for (f32x16& s : sums) s = zero();
  for (int64_t j = token * p.k; j < (token + 1) * p.k; ++j) {
    if (p.rows[j] < 0 || p.rows[j] >= p.num_y) continue;
    const T* y = static_cast<const T*>(p.y) + p.rows[j] * p.y_stride + first;
    const f32x16 weight = broadcast(p.weights ? p.weights[j] : 1.f);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[v] = fma(weight, kFull ? load(y + v * kLanes) : load_some(y, lanes), sums[v]);
  }
  T* out = static_cast<T*>(p.out) + token * p.width + first;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    if (kFull) store(out + v * kLanes, sums[v]);
    else store_some(out, sums[v], lanes);
  }
}

void unpermute_rows(const UnpermuteRowsParams& p) {
  const int64_t grain = 16384 / (p.width * (p.k + 1) + 1) + 1;  // about 64 KB of floats a task
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.tokens, grain, [&](int64_t token) {
      constexpr int kVecs = 4;
      int64_t c = 0;
      for (; c + kVecs * kLanes <= p.width; c += kVecs * kLanes) weighted_sum<kVecs, true, T>(p, token, c, kLanes);
      for (; c + kLanes <= p.width; c += kLanes) weighted_sum<1, true, T>(p, token, c, kLanes);
      if (c < p.width) weighted_sum<1, false, T>(p, token, c, static_cast<int>(p.width - c));
    });
  });
}

}  // namespace stretto::STRETTO_ISA
