// Tensor-core and asynchronous-copy instructions of compute capability 8.0 and later as functions: PTX under nvcc, the same lane by lane under
// tests/cuda_shim. Layouts as in the PTX ISA (g = lane / 4, t = lane % 4):
//   A [16, 16] row-major   a[0] (g, 2t..2t+1)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)    two elements a register
//   B [16, 8]              b[0] (2t..2t+1, g)  b[1] (2t + 8.., g)
//   C [16, 8] float        c[0], c[1] (g, 2t..)  c[2], c[3] (g + 8, 2t..)
// Every lane of a warp must call them together.
#pragma once
#include "common/cuda_utils.cuh"
#ifndef __CUDACC__
#include "mma_emulated.h"
#endif

namespace stretto {

// c += A B, sums in float. T: half_t or bfloat16_t.
template <class T> __device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, half_t>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  stretto_shim::mma_m16n8k16(c, a, b, [](uint16_t bits) { return to_float(T{bits}); });
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i brings the address of row i % 8 of matrix i / 8 (16-byte aligned); r[m] is
// then row lane / 4, elements 2 (lane % 4) and the next, of matrix m. kTransposed: the same of the transposed matrices.
template <bool kTransposed> __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
#else
  stretto_shim::ldmatrix_x4(r, row, kTransposed);
#endif
}

// kBytes (4, 8 or 16) from global to shared memory, both aligned to that; where not `valid` nothing is read and zeros are written. Arrives when
// the thread has waited; other threads see it after a barrier behind that.
template <int kBytes> __device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(global), "n"(kBytes), "r"(bytes) : "memory");
#else
  stretto_shim::copy_later(shared, global, valid ? kBytes : 0, valid ? 0 : kBytes);
#endif
}

// Closes the group of copies issued since the last one.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  stretto_shim::copy_commit();
#endif
}

// Waits for all groups of this thread but the kLeft youngest.
template <int kLeft> __device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  stretto_shim::copy_wait(kLeft);
#endif
}

// Two neighbours of a row as a register of A or B; the first is the low half.
template <class T> __device__ __forceinline__ uint32_t pack2(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

}  // namespace stretto
