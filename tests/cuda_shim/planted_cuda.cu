// Kernels with one mistake each. The shim must see every one of them (test_shim.py).
#include "common/cuda_utils.cuh"
#include "common/mma.cuh"

namespace stretto {

struct PlantedParams {
  float* out;  // [threads]
  const float* in;
  int64_t threads;
};

namespace {

__global__ void right_kernel(const PlantedParams p) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
}

__global__ void missing_barrier_kernel(const PlantedParams p) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = s[(threadIdx.x + 1) % blockDim.x];
}

__global__ void race_kernel(const PlantedParams p) {  // every thread writes the same word: the last one wins
  float* s = shared_memory<float>();
  s[0] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = s[0];
}

__global__ void block_race_kernel(const PlantedParams p) {  // as race_kernel, between blocks
  if (threadIdx.x == 0) p.out[0] = float(blockIdx.x);
}

__global__ void past_shared_kernel(const PlantedParams p) {
  float* s = shared_memory<float>();
  s[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void past_input_kernel(const PlantedParams p) { p.out[threadIdx.x] = p.in[threadIdx.x + 1]; }

__global__ void early_return_kernel(const PlantedParams p) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

__global__ void parted_barrier_kernel(const PlantedParams p) {
  if (threadIdx.x % 2) __syncthreads();
  else __syncthreads();
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

__global__ void parted_warp_kernel(const PlantedParams p) {
  float x = p.in[threadIdx.x];
  if (threadIdx.x < 16) x = __shfl_xor_sync(kAllLanes, x, 1);
  else __syncthreads();
  p.out[threadIdx.x] = x;
}

__global__ void absent_lane_kernel(const PlantedParams p) {
  p.out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(0xffffu, p.in[threadIdx.x], 20) : 0.f;
}

__global__ void copy_not_awaited_kernel(const PlantedParams p) {
  float* s = shared_memory<float>();
  cp_async<4>(s + threadIdx.x, p.in + threadIdx.x);
  cp_async_commit();
  __syncthreads();
  p.out[threadIdx.x] = s[threadIdx.x];
  cp_async_wait<0>();
}

// Not planted: out [16, 8] = A [16, 16] B [16, 8] through cp.async, ldmatrix and mma.sync; in holds A, then B transposed, as floats.
__global__ void product_kernel(const PlantedParams p) {
  struct Shared {
    float raw[16 * 16 + 8 * 16];
    bfloat16_t a[16][16], b[16][8];
  };
  Shared& s = *shared_memory<Shared>();
  for (int i = threadIdx.x; i < 96; i += 32) cp_async<16>(s.raw + 4 * i, p.in + 4 * i);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += 32) s.a[i / 16][i % 16] = from_float<bfloat16_t>(s.raw[i]);
  for (int i = threadIdx.x; i < 128; i += 32) s.b[i % 16][i / 16] = from_float<bfloat16_t>(s.raw[256 + i]);
  __syncthreads();
  uint32_t a[4], b[4];
  const int lane = threadIdx.x;
  ldmatrix_x4<false>(a, &s.a[lane % 16][lane / 16 * 8]);
  ldmatrix_x4<true>(b, &s.b[lane % 16][0]);
  float c[4] = {};
  mma_m16n8k16<bfloat16_t>(c, a, {b[0], b[1]});
  for (int i = 0; i < 4; ++i) p.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}
void product_cuda(const PlantedParams& p, cudaStream_t stream) {
  launch_kernel<product_kernel>({.grid = 1, .block = 32, .smem_bytes = 2304, .stream = stream}, p);
}

template <auto kKernel> void run(const PlantedParams& p, cudaStream_t stream, unsigned blocks = 1) {
  launch_kernel<kKernel>({.grid = blocks, .block = unsigned(p.threads), .smem_bytes = size_t(p.threads) * 4, .stream = stream}, p);
}

}  // namespace

#define STRETTO_PLANTED(name, blocks)                                                                      \
  void name##_cuda(const PlantedParams& p, cudaStream_t stream) { run<name##_kernel>(p, stream, blocks); } \
  STRETTO_CUDA_KERNEL(name, PlantedParams)

STRETTO_CUDA_KERNEL(product, PlantedParams)
STRETTO_PLANTED(right, 1)
STRETTO_PLANTED(missing_barrier, 1)
STRETTO_PLANTED(race, 1)
STRETTO_PLANTED(block_race, 5)
STRETTO_PLANTED(past_shared, 1)
STRETTO_PLANTED(past_input, 1)
STRETTO_PLANTED(early_return, 1)
STRETTO_PLANTED(parted_barrier, 1)
STRETTO_PLANTED(parted_warp, 1)
STRETTO_PLANTED(absent_lane, 1)
STRETTO_PLANTED(copy_not_awaited, 1)

}  // namespace stretto
