// What a library of CUDA kernels (python/stretto/_cuda.so, or the tests' shim) offers to _C: a table of launchers. Plain C at the border, so
// that the library needs neither Python nor torch and a stale one is refused rather than misread.
#pragma once
#include <cstddef>
#include <cstdint>

namespace stretto {

inline constexpr uint32_t kKernelAbi = 1;  // of this header

struct KernelEntry {
  const char* name;
  size_t params_bytes;  // sizeof of the op's parameter struct: differs where library and module were built from different sources
  // Launches on a device and one of its streams and returns at once: 0, or 1 and a message.
  int (*launch)(const void* params, int device, void* stream, char* error, size_t error_bytes);
};

struct KernelTable {
  uint32_t abi;
  uint32_t count;
  const KernelEntry* entries;
  const char* target;  // "cuda", or "shim": device memory is host memory
};

using KernelTableFn = const KernelTable* (*)();
inline constexpr const char* kKernelTableSymbol = "stretto_kernel_table";

}  // namespace stretto
