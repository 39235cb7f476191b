#include "kernels/attention/merge_states.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

// a * wa + b * wb for 16 elements from i on; a side of weight 0 is not read: it may hold NaN.
template <class T, class Load> STRETTO_INLINE f32x16 weighted(const MergeWeights& w, const T* a, const T* b, const Load& read) {
  const f32x16 left = w.a == 0.f ? zero() : mul(broadcast(w.a), read(a));
  return w.b == 0.f ? left : fma(broadcast(w.b), read(b), left);
}

template <class T> static void merge_row(const MergeStatesParams& p, int64_t row) {
  const MergeWeights w = merge_weights(p.lse_a[row], p.lse_b[row]);
  const T *a = static_cast<const T*>(p.a) + row * p.head_dim, *b = static_cast<const T*>(p.b) + row * p.head_dim;
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  const int64_t whole = p.head_dim / kLanes * kLanes;
  const int tail = static_cast<int>(p.head_dim - whole);
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, weighted(w, a + i, b + i, [](const T* x) { return load(x); }));
  if (tail) store_some(out + whole, weighted(w, a + whole, b + whole, [&](const T* x) { return load_some(x, tail); }), tail);
  p.lse_out[row] = w.lse;
}

void merge_states(const MergeStatesParams& p) {
  dispatch_float(p.dtype, [&](auto tag) {
    constexpr int64_t kGrain = 64;  // rows a task, about 50 KB at head_dim 128: several times the hand-over, and stays in L2
    parallel_for(0, p.rows, kGrain, [&](int64_t row) { merge_row<typename decltype(tag)::type>(p, row); });
  });
}

}  // namespace stretto::STRETTO_ISA
