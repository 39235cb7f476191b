#include "common/cuda_utils.cuh"
#include "kernels/norm/rms_norm.h"

namespace stretto {
namespace {

constexpr int kBlock = 256;
constexpr int kHeld = 4;  // packs of a thread that stay in registers between the two passes: rows to 8192 bf16 are read once

// kThreads threads own a row; a block holds kBlock / kThreads rows. A thread owns packs kThreads apart whatever the strides, so that the order of
// the sum, and with it a row's bits, depends on the width alone. Each element is read and written by one thread: out may be x or residual.
template <class T, int kThreads> __global__ void __launch_bounds__(kBlock) rms_norm_kernel(const RmsNormParams p, const bool whole_packs) {
  constexpr int kWide = kPack<T>;
  const int64_t row = int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= rows_in_use(p.num_rows, p.rows)) return;  // all threads that would have shared a sum
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const int64_t first = int64_t(threadIdx.x % kThreads) * kWide, step = int64_t(kThreads) * kWide;

  Pack<T, kWide> held[kHeld];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = first + i * step;
    if (at < p.width) held[i] = load_pack(x, at, p.width, whole_packs);
    else held[i] = {};
#pragma unroll
    for (int j = 0; j < kWide; ++j) squares = fmaf(to_float(held[i].v[j]), to_float(held[i].v[j]), squares);
  }
  for (int64_t at = first + kHeld * step; at < p.width; at += step) {
    const Pack<T, kWide> v = load_pack(x, at, p.width, whole_packs);
#pragma unroll
    for (int j = 0; j < kWide; ++j) squares = fmaf(to_float(v.v[j]), to_float(v.v[j]), squares);
  }
  if constexpr (kThreads == kWarp) squares = warp_sum(squares);
  else squares = block_sum<kThreads>(squares, shared_memory<float>());
  const float scale = 1.f / sqrtf(squares / static_cast<float>(p.width) + p.eps);

  const auto finish = [&](int64_t at, const Pack<T, kWide>& v) {
    Pack<T, kWide> added{}, result;
    if (residual) added = load_pack(residual, at, p.width, whole_packs);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      const float weight = at + j < p.width ? __ldg(p.weight + at + j) : 0.f;
      const float normed = to_float(v.v[j]) * scale * weight;
      result.v[j] = from_float<T>(residual ? to_float(added.v[j]) + normed : normed);
    }
    store_pack(out, at, p.width, whole_packs, result);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (first + i * step < p.width) finish(first + i * step, held[i]);
  for (int64_t at = first + kHeld * step; at < p.width; at += step) finish(at, load_pack(x, at, p.width, whole_packs));
}

}  // namespace

void rms_norm_cuda(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.width == 0) return;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int64_t kWide = kPack<T>;
    const bool whole_packs = aligned16(p.x) && aligned16(p.out) && (!p.residual || aligned16(p.residual)) && p.width % kWide == 0 &&
                             p.x_stride % kWide == 0 && p.out_stride % kWide == 0 && p.residual_stride % kWide == 0;
    if (p.width <= kWarp * kHeld * kWide) {
      constexpr int64_t kRows = kBlock / kWarp;
      launch_kernel<rms_norm_kernel<T, kWarp>>({.grid = unsigned(ceil_div(p.rows, kRows)), .block = kBlock, .stream = stream}, p, whole_packs);
    } else {
      launch_kernel<rms_norm_kernel<T, kBlock>>(
          {.grid = unsigned(p.rows), .block = kBlock, .smem_bytes = kBlock / kWarp * sizeof(float), .stream = stream}, p, whole_packs);
    }
  });
}

STRETTO_CUDA_KERNEL(rms_norm, RmsNormParams)

}  // namespace stretto
