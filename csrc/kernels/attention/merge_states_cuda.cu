#include "common/cuda_utils.cuh"
#include "kernels/attention/merge_states.h"

namespace stretto {
namespace {

constexpr int kBlock = 256;

// One at least: the first pack's thread writes the lse.
template <class T> STRETTO_HD int64_t packs_of_row(int64_t head_dim) { return head_dim > 0 ? ceil_div(head_dim, int64_t(kPack<T>)) : 1; }

// One thread owns a pack of one row; neighbours share the row, so that its lse loads hit L1. A side of weight 0 is not read: it may hold NaN.
template <class T> __global__ void __launch_bounds__(kBlock) merge_states_kernel(const MergeStatesParams p, const bool whole_packs) {
  constexpr int kWide = kPack<T>;
  const int64_t packs = packs_of_row<T>(p.head_dim), i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= p.rows * packs) return;
  const int64_t row = i / packs, at = i % packs * kWide;
  const MergeWeights w = merge_weights(p.lse_a[row], p.lse_b[row]);
  Pack<T, kWide> a{}, b{};
  if (w.a != 0.f) a = load_pack(static_cast<const T*>(p.a) + row * p.head_dim, at, p.head_dim, whole_packs);
  if (w.b != 0.f) b = load_pack(static_cast<const T*>(p.b) + row * p.head_dim, at, p.head_dim, whole_packs);
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    const float left = w.a == 0.f ? 0.f : w.a * to_float(a.v[j]);
    a.v[j] = from_float<T>(w.b == 0.f ? left : fmaf(w.b, to_float(b.v[j]), left));
  }
  store_pack(static_cast<T*>(p.out) + row * p.head_dim, at, p.head_dim, whole_packs, a);
  if (at == 0) p.lse_out[row] = w.lse;
}

}  // namespace

void merge_states_cuda(const MergeStatesParams& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool whole_packs = aligned16(p.a) && aligned16(p.b) && aligned16(p.out) && p.head_dim > 0 && p.head_dim % kPack<T> == 0;
    const int64_t packs = p.rows * packs_of_row<T>(p.head_dim);
    launch_kernel<merge_states_kernel<T>>({.grid = unsigned(ceil_div(packs, int64_t(kBlock))), .block = kBlock, .stream = stream}, p, whole_packs);
  });
}

STRETTO_CUDA_KERNEL(merge_states, MergeStatesParams)

}  // namespace stretto
