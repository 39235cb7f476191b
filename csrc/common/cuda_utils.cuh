// For *_cuda.cu: launching, shared memory, element types, sums. The same sources are compiled by nvcc and, for tests without a GPU, by the C++
// compiler against tests/cuda_shim; whatever differs between the two stands here and in mma.cuh, not in kernels.
#pragma once
#include <cuda_runtime.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/kernel_table.h"

namespace stretto {

#ifdef __CUDACC__
inline constexpr const char* kKernelTarget = "cuda";
#else
inline constexpr const char* kKernelTarget = "shim";
#endif

// ---- host: registration and launch

std::vector<KernelEntry>& kernel_entries();

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// The device of the tensors while kernels are launched; the caller's afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_));
    if (device != before_) check_cuda(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class P, void (*kHost)(const P&, cudaStream_t)>
int launch_entry(const void* params, int device, void* stream, char* error, size_t error_bytes) noexcept {
  try {
    const DeviceGuard guard(device);
    kHost(*static_cast<const P*>(params), static_cast<cudaStream_t>(stream));
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
}

// At the end of OP_cuda.cu: STRETTO_CUDA_KERNEL(op, Params) after `void op_cuda(const Params&, cudaStream_t)`. No list to edit.
#define STRETTO_CUDA_KERNEL(op, Params)                                                                                   \
  static const bool registered_##op =                                                                                     \
      (::stretto::kernel_entries().push_back({#op, sizeof(Params), &::stretto::launch_entry<Params, &op##_cuda>}), true);

struct Launch {
  dim3 grid;  // not empty: a grid of zero blocks is a launch error, so an op without work returns before
  dim3 block;
  size_t smem_bytes = 0;
  cudaStream_t stream = nullptr;
};

// launch_kernel<some_kernel<T>>({.grid = ..., .block = ..., .stream = stream}, params)
template <auto kKernel, class... Args> void launch_kernel(const Launch& l, const Args&... args) {
#ifdef __CUDACC__
  constexpr size_t kDefaultLimit = 48 << 10;  // what a kernel may have without asking
  if (l.smem_bytes > kDefaultLimit)
    check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.smem_bytes)));
  kKernel<<<l.grid, l.block, l.smem_bytes, l.stream>>>(args...);
  check_cuda(cudaGetLastError());
#else
  stretto_shim::launch(__PRETTY_FUNCTION__, l.grid, l.block, l.smem_bytes, [&] { kKernel(args...); });
#endif
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <class T> STRETTO_HD constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

// ---- device: shared memory and element types

// The block's dynamic shared memory (Launch::smem_bytes), 128-byte aligned. Kernels use no other: static arrays would be out of the shim's sight.
template <class T> __device__ __forceinline__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char stretto_shared[];
  return reinterpret_cast<T*>(stretto_shared);
#else
  return static_cast<T*>(stretto_shim::shared_memory());
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
#ifdef __CUDACC__
__device__ __forceinline__ float to_float(half_t x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(bfloat16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
template <> __device__ __forceinline__ half_t from_float<half_t>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
template <> __device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
#else
inline float to_float(half_t x) { return stretto_shim::half_to_float(x.bits); }
inline float to_float(bfloat16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
template <> inline half_t from_float<half_t>(float x) { return {stretto_shim::float_to_half(x)}; }
template <> inline bfloat16_t from_float<bfloat16_t>(float x) { return {stretto_shim::float_to_bfloat16(x)}; }
#endif

// Elements that travel together: 16 bytes are the widest access of a thread.
template <class T, int kCount> struct alignas(sizeof(T) * kCount) Pack { T v[kCount]; };
template <class T> inline constexpr int kPack = 16 / sizeof(T);

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// kPack<T> elements from `at` on, zeros from `end` on; `whole`: the pointer is 16-byte aligned and the pack lies before the end.
template <class T> __device__ __forceinline__ Pack<T, kPack<T>> load_pack(const T* row, int64_t at, int64_t end, bool whole) {
  if (whole) return *reinterpret_cast<const Pack<T, kPack<T>>*>(row + at);
  Pack<T, kPack<T>> r{};
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i)
    if (at + i < end) r.v[i] = row[at + i];
  return r;
}
template <class T> __device__ __forceinline__ void store_pack(T* row, int64_t at, int64_t end, bool whole, const Pack<T, kPack<T>>& p) {
  if (whole) {
    *reinterpret_cast<Pack<T, kPack<T>>*>(row + at) = p;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i)
    if (at + i < end) row[at + i] = p.v[i];
}

// Rows in use: ops of a captured step read their count from the device.
__device__ __forceinline__ int64_t rows_in_use(const int32_t* num_rows, int64_t rows) { return num_rows && *num_rows < rows ? *num_rows : rows; }

// ---- device: reductions. Fixed trees, so results are the same bits on every run; every thread gets the result.

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
// NaN is lost where the other operand is a number, as in fmaxf.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// scratch: kThreads / 32 values of shared memory, free again after the block's next barrier.
template <int kThreads, class T> __device__ __forceinline__ T block_sum(T x, T* scratch) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = scratch[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) sum += scratch[i];
  return sum;
}

}  // namespace stretto
