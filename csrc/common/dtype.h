// Element types as kernels know them, and dispatch from a runtime type to a template argument.
#pragma once
#include <cstdint>

// Code that kernels share with *_cuda.cu: contracts, pure index arithmetic, the noise.
#ifdef __CUDACC__
#define STRETTO_HD __host__ __device__
#else
#define STRETTO_HD
#endif

namespace stretto {

enum class DType : int32_t { f32, f16, bf16, f64, i8, u8, i32, i64, u64, boolean };

struct half_t { uint16_t bits; };      // IEEE binary16
struct bfloat16_t { uint16_t bits; };  // upper half of binary32

STRETTO_HD inline int64_t dtype_bytes(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64:
    case DType::u64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::i8:
    case DType::u8:
    case DType::boolean: return 1;
  }
  return 0;
}

inline const char* dtype_name(DType t) {
  constexpr const char* names[] = {"float32", "float16", "bfloat16", "float64", "int8", "uint8", "int32", "int64", "uint64", "bool"};
  return names[static_cast<int>(t)];
}

[[noreturn]] void unsupported_dtype(DType t, const char* expected);  // throws; out of line, see common/simd.h on std:: in kernels

template <class T> struct TypeTag { using type = T; };

// Calls f(TypeTag<T>{}) for the three floating types a kernel computes in.
template <class F> void dispatch_float(DType t, F&& f) {
  if (t == DType::f32) return f(TypeTag<float>{});
  if (t == DType::f16) return f(TypeTag<half_t>{});
  if (t == DType::bf16) return f(TypeTag<bfloat16_t>{});
  unsupported_dtype(t, "float32, float16 or bfloat16");
}

}  // namespace stretto
