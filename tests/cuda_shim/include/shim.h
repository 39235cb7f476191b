// A block of threads on the CPU. The threads are fibers of one operating-system thread: each runs until it meets others (a barrier, a shuffle),
// so between two meetings nothing interleaves, and what depends on the order of threads can be seen by running in another order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };

namespace stretto_shim {

// Of the fiber that runs; launches take turns (a lock), so these are plain variables.
extern uint3 thread_index, block_index;
extern dim3 block_dim, grid_dim;

// Runs body once for each thread of each block. Throws std::runtime_error naming kernel, block and thread on a bad access, on threads that
// part at a barrier or a warp collective, and on copies nobody waited for.
void launch_threads(const char* kernel, dim3 grid, dim3 block, size_t smem_bytes, void (*body)(const void*), const void* context);
template <class F> void launch(const char* kernel, dim3 grid, dim3 block, size_t smem_bytes, const F& f) {
  launch_threads(kernel, grid, block, smem_bytes, [](const void* c) { (*static_cast<const F*>(c))(); }, &f);
}

void* shared_memory();
bool in_shared_memory(const void* p, size_t bytes);

// The whole block meets; the sum of `value` over its threads.
int barrier(const char* what, int value, int line);

// The lanes of `mask` meet; the last to come calls finish(mask, slots), slots[lane] being what that lane brought.
void warp_meet(const char* what, unsigned mask, void* slot, void (*finish)(unsigned mask, void* const* slots), int line);

// cp.async: the bytes arrive when they are waited for, or at once in every other order of threads (set_order).
void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void copy_commit();
void copy_wait(int groups_left);

// Ends the launch with this message. For the shim's own checks.
[[noreturn]] void fail(const std::string& problem);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);      // to nearest, ties to even
uint16_t float_to_bfloat16(float x);  // the same; NaN stays NaN

}  // namespace stretto_shim

// ---- the runtime's functions that launchers call

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
inline const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "invalid argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 227 << 10;  // few, so that small inputs meet grids that loop
  return cudaSuccess;
}
