// Stands in for CUDA's header of this name when the tests compile *_cuda.cu with the C++ compiler: what kernels and their launchers use of CUDA,
// and no more. A kernel that needs another intrinsic adds it here, with its meaning. `__shared__` is missing on purpose: shared memory comes
// from shared_memory<T>() alone, so that it can be poisoned and fenced.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "shim.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static

#define threadIdx (::stretto_shim::thread_index)
#define blockIdx (::stretto_shim::block_index)
#define blockDim (::stretto_shim::block_dim)
#define gridDim (::stretto_shim::grid_dim)
inline constexpr int warpSize = 32;

// ---- vectors

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- barriers and collectives. The line a call stands in is part of the messages.

inline void __syncthreads(int line = __builtin_LINE()) { stretto_shim::barrier("__syncthreads", 0, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return stretto_shim::barrier("__syncthreads_count", predicate != 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return stretto_shim::barrier("__syncthreads_or", predicate != 0, line) > 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return stretto_shim::barrier("__syncthreads_and", predicate == 0, line) == 0;
}

namespace stretto_shim {

// Every lane of `mask` meets here; the last to come computes lane i's result from all arguments: result = f(lane, arguments).
template <class Out, class In, class F> Out exchange(const char* what, unsigned mask, const In& in, const F& f, int line) {
  struct Slot {
    const In* in;
    Out out;
    const F* f;
  } slot{&in, {}, &f};
  warp_meet(
      what, mask, &slot,
      [](unsigned all, void* const* slots) {
        const In* in[32] = {};
        for (int lane = 0; lane < 32; ++lane)
          if (all >> lane & 1) in[lane] = static_cast<Slot*>(slots[lane])->in;
        for (int lane = 0; lane < 32; ++lane)
          if (all >> lane & 1) static_cast<Slot*>(slots[lane])->out = (*static_cast<Slot*>(slots[lane])->f)(lane, in);
      },
      line);
  return slot.out;
}

// The lane read is source(own lane); what lies outside the lane's segment of `width` is its own value.
template <class T, class Source> T shuffle(const char* what, unsigned mask, T value, int width, const Source& source, int line) {
  return exchange<T>(
      what, mask, value,
      [&](int lane, const T* const* in) {
        const int from = source(lane, lane / width * width);
        if (from < lane / width * width || from >= lane / width * width + width) return *in[lane];
        if (!in[from]) fail(std::string(what) + " reads lane " + std::to_string(from) + ", which takes no part");
        return *in[from];
      },
      line);
}

}  // namespace stretto_shim

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  stretto_shim::exchange<int>("__syncwarp", mask, 0, [](int, const int* const*) { return 0; }, line);
}
template <class T> T __shfl_sync(unsigned mask, T v, int lane, int width = 32, int line = __builtin_LINE()) {
  return stretto_shim::shuffle("__shfl_sync", mask, v, width, [&](int, int base) { return base + (lane & (width - 1)); }, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, int line = __builtin_LINE()) {
  return stretto_shim::shuffle("__shfl_xor_sync", mask, v, width, [&](int own, int) { return own ^ bits; }, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
  return stretto_shim::shuffle("__shfl_up_sync", mask, v, width, [&](int own, int) { return own - int(by); }, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, int line = __builtin_LINE()) {
  return stretto_shim::shuffle("__shfl_down_sync", mask, v, width, [&](int own, int) { return own + int(by); }, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return stretto_shim::exchange<unsigned>(
      "__ballot_sync", mask, predicate,
      [](int, const int* const* in) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= unsigned(in[i] && *in[i]) << i;
        return bits;
      },
      line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) { return __ballot_sync(mask, predicate, line) == mask; }
template <class T> unsigned __match_any_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  return stretto_shim::exchange<unsigned>(
      "__match_any_sync", mask, v,
      [](int lane, const T* const* in) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= unsigned(in[i] && *in[i] == *in[lane]) << i;
        return bits;
      },
      line);
}
template <class T, class F> T stretto_shim_reduce(const char* what, unsigned mask, T v, const F& f, int line) {
  return stretto_shim::exchange<T>(
      what, mask, v,
      [&](int lane, const T* const* in) {
        T r = *in[lane];
        for (int i = 0; i < 32; ++i)
          if (in[i] && i != lane) r = f(r, *in[i]);
        return r;
      },
      line);
}
template <class T> T __reduce_add_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  return stretto_shim_reduce("__reduce_add_sync", mask, v, [](T a, T b) { return a + b; }, line);
}
template <class T> T __reduce_max_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  return stretto_shim_reduce("__reduce_max_sync", mask, v, [](T a, T b) { return a > b ? a : b; }, line);
}
template <class T> T __reduce_min_sync(unsigned mask, T v, int line = __builtin_LINE()) {
  return stretto_shim_reduce("__reduce_min_sync", mask, v, [](T a, T b) { return a < b ? a : b; }, line);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v, int line = __builtin_LINE()) {
  return stretto_shim_reduce("__reduce_or_sync", mask, v, [](unsigned a, unsigned b) { return a | b; }, line);
}

// ---- memory

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// One block runs at a time and a thread keeps the processor until it meets others: plain operations are atomic.
template <class T> T atomicAdd(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T> T atomicSub(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old - v;
  return old;
}
template <class T> T atomicMax(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old > v ? old : v;
  return old;
}
template <class T> T atomicMin(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old < v ? old : v;
  return old;
}
template <class T> T atomicOr(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T> T atomicAnd(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old & v;
  return old;
}
template <class T> T atomicExch(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T> T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

// ---- arithmetic

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
template <class To, class From> To stretto_shim_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline unsigned __float_as_uint(float x) { return stretto_shim_bits<unsigned>(x); }
inline int __float_as_int(float x) { return stretto_shim_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return stretto_shim_bits<float>(x); }
inline float __int_as_float(int x) { return stretto_shim_bits<float>(x); }
inline long long __double_as_longlong(double x) { return stretto_shim_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return stretto_shim_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
  return c;
}
