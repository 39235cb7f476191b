#include "kernels/rope/rope_append.h"

#include "common/cuda_utils.cuh"

namespace stretto {
namespace {

constexpr int kBlock = 128;

struct Shared {
  float x[kMaxHeadDim];
  float scratch[kBlock / kWarp];
};

// Writes a head of shared memory into its place of a page, `stride` elements apart; int8 with a scale of its own.
template <class T> __device__ void write_head(const float* x, int64_t head_dim, T* to, int64_t stride, float* scale, float* scratch) {
  if constexpr (sizeof(T) != 1) {
    for (int64_t i = threadIdx.x; i < head_dim; i += kBlock) to[i * stride] = from_float<T>(x[i]);
  } else {
    float largest = 0.f;
    bool infinite = false;
    for (int64_t i = threadIdx.x; i < head_dim; i += kBlock) {
      largest = fmaxf(largest, fabsf(x[i]));
      infinite |= !(fabsf(x[i]) <= 3.402823466e38f);
    }
    largest = warp_max(largest);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = largest;
    infinite = __syncthreads_or(infinite);
    for (int w = 0; w < kBlock / kWarp; ++w) largest = fmaxf(largest, scratch[w]);
    const float own = infinite ? __int_as_float(0x7fc00000) : largest / 127.f;
    const float divisor = !infinite && own > 0.f ? own : __int_as_float(0x7f800000);  // not 127 / largest: below 1e-36 that would be infinite
    for (int64_t i = threadIdx.x; i < head_dim; i += kBlock) to[i * stride] = static_cast<T>(infinite ? 0.f : rintf(x[i] / divisor));
    if (threadIdx.x == 0) *scale = own;
  }
}

// A block a row and head: first the query heads, then the keys, then the values.
template <class T> __global__ void __launch_bounds__(kBlock) rope_append_kernel(const RopeAppendParams p) {
  const int64_t row = blockIdx.x, head = blockIdx.y, head_dim = p.head_dim;
  if (row >= rows_in_use(p.num_rows, p.rows)) return;
  Shared& s = *shared_memory<Shared>();
  const bool is_query = head < p.heads, is_value = head >= p.heads + p.kv_heads;
  const int64_t slot = p.slots[row];
  if (!is_query && (slot < 0 || slot >= p.pages * p.page_size)) return;
  float* x = p.qkv + row * p.row_stride + head * head_dim;
  for (int64_t i = threadIdx.x; i < head_dim; i += kBlock) s.x[i] = x[i];
  __syncthreads();
  const float* weight = is_query ? p.q_norm : is_value ? nullptr : p.k_norm;
  if (weight) {
    float squares = 0.f;
    for (int64_t i = threadIdx.x; i < head_dim; i += kBlock) squares = fmaf(s.x[i], s.x[i], squares);
    const float scale = 1.f / sqrtf(block_sum<kBlock>(squares, s.scratch) / static_cast<float>(head_dim) + p.norm_eps);
    for (int64_t i = threadIdx.x; i < head_dim; i += kBlock) s.x[i] = s.x[i] * scale * weight[i];
    __syncthreads();
  }
  if (!is_value) {
    const int64_t half = p.rotary_dim / 2, at = p.positions[row];
    const float* cosine = p.cos_sin + (at < 0 ? 0 : at >= p.max_positions ? p.max_positions - 1 : at) * p.rotary_dim;
    for (int64_t i = threadIdx.x; i < half; i += kBlock) {  // a thread owns a pair
      float &a = s.x[p.interleaved ? 2 * i : i], &b = s.x[p.interleaved ? 2 * i + 1 : i + half];
      const float c = cosine[i], d = cosine[i + half], ra = a * c - b * d, rb = b * c + a * d;
      a = ra, b = rb;
    }
    __syncthreads();
  }
  if (is_query) {
    for (int64_t i = threadIdx.x; i < head_dim; i += kBlock) x[i] = s.x[i];
    return;
  }
  const int64_t first = (head - p.heads) % p.kv_heads * p.page_size, page = slot / p.page_size, offset = slot % p.page_size, at = first + offset;
  if (is_value) {
    write_head(s.x, head_dim, static_cast<T*>(p.v_pages) + page * p.v_page + at * head_dim, 1, p.v_scales + page * p.v_scale_page + at, s.scratch);
  } else {
    T* column = static_cast<T*>(p.k_pages) + page * p.k_page + first * head_dim + offset;
    write_head(s.x, head_dim, column, p.page_size, p.k_scales + page * p.k_scale_page + at, s.scratch);
  }
}

}  // namespace

void rope_append_cuda(const RopeAppendParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.max_positions == 0) return;
  const auto run = [&](auto tag) {
    const dim3 grid(unsigned(p.rows), unsigned(p.heads + 2 * p.kv_heads));
    launch_kernel<rope_append_kernel<typename decltype(tag)::type>>({.grid = grid, .block = kBlock, .smem_bytes = sizeof(Shared), .stream = stream},
                                                                    p);
  };
  if (p.dtype == DType::i8) run(TypeTag<int8_t>{});
  else dispatch_float(p.dtype, run);
}

STRETTO_CUDA_KERNEL(rope_append, RopeAppendParams)

}  // namespace stretto
