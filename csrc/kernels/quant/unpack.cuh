// One value of a packed weight (formats.h), in the operations of the file format's own definition.
#pragma once
#include "common/cuda_utils.cuh"
#include "kernels/quant/formats.h"

namespace stretto {

__device__ __forceinline__ float half_at(const uint8_t* p, int lane) { return to_float(reinterpret_cast<const half_t*>(p)[lane]); }
__device__ __forceinline__ int nibble(const uint8_t* block, int byte, int quad) { return (block[64 * (quad & 3) + byte] >> (quad < 4 ? 0 : 4)) & 15; }

// Value i of row `lane` of a unit.
template <WeightFormat kFormat> __device__ __forceinline__ float unpack_value(const uint8_t* unit, int lane, int i) {
  if constexpr (kFormat == WeightFormat::f32) return reinterpret_cast<const float*>(unit)[lane];
  else if constexpr (kFormat == WeightFormat::f16) return half_at(unit, lane);
  else if constexpr (kFormat == WeightFormat::bf16) return to_float(reinterpret_cast<const bfloat16_t*>(unit)[lane]);
  else {
    const int b = i / 32, quad = i % 32 / 4, byte = 4 * lane + i % 4;
    if constexpr (kFormat == WeightFormat::q8_0) return half_at(unit + 512, lane) * static_cast<float>(unit[64 * quad + byte] - 128);
    else if constexpr (kFormat == WeightFormat::q4_0) return half_at(unit + 256, lane) * static_cast<float>(nibble(unit, byte, quad) - 8);
    else if constexpr (kFormat == WeightFormat::q4_1)
      return half_at(unit + 256, lane) * static_cast<float>(nibble(unit, byte, quad)) + half_at(unit + 288, lane);
    else if constexpr (kFormat == WeightFormat::q5_0 || kFormat == WeightFormat::q5_1) {
      const int q = nibble(unit, byte, quad) | (unit[256 + byte] >> quad & 1) << 4;
      const float d = half_at(unit + 320, lane);
      if constexpr (kFormat == WeightFormat::q5_0) return d * static_cast<float>(q - 16);
      else return d * static_cast<float>(q) + half_at(unit + 352, lane);
    } else if constexpr (kFormat == WeightFormat::q4_k || kFormat == WeightFormat::q5_k) {
      constexpr bool kFive = kFormat == WeightFormat::q5_k;
      const uint8_t *block = unit + 320 + (kFive ? 320 : 256) * b, *scales = unit + 64 + 32 * b + lane;
      int q = nibble(block, byte, quad);
      if constexpr (kFive) q |= (block[256 + byte] >> quad & 1) << 4;
      return half_at(unit, lane) * static_cast<float>(scales[0]) * static_cast<float>(q) - half_at(unit + 32, lane) * static_cast<float>(scales[16]);
    } else {
      static_assert(kFormat == WeightFormat::q6_k);
      const uint8_t* block = unit + 288 + 384 * b;
      const int q = nibble(block, byte, quad) | (block[256 + 64 * (quad / 4) + byte] >> 2 * (quad & 3) & 3) << 4;
      const int8_t sc = static_cast<int8_t>(unit[32 + 16 * (i / 16) + lane]);
      return half_at(unit, lane) * static_cast<float>(sc) * static_cast<float>(q - 32);
    }
  }
}

template <WeightFormat kFormat> struct FormatTag { static constexpr WeightFormat value = kFormat; };

// Calls f(FormatTag<format>{}).
template <class F> void dispatch_format(WeightFormat format, const F& f) {
  switch (format) {
    case WeightFormat::f32: return f(FormatTag<WeightFormat::f32>{});
    case WeightFormat::f16: return f(FormatTag<WeightFormat::f16>{});
    case WeightFormat::bf16: return f(FormatTag<WeightFormat::bf16>{});
    case WeightFormat::q8_0: return f(FormatTag<WeightFormat::q8_0>{});
    case WeightFormat::q4_0: return f(FormatTag<WeightFormat::q4_0>{});
    case WeightFormat::q4_1: return f(FormatTag<WeightFormat::q4_1>{});
    case WeightFormat::q5_0: return f(FormatTag<WeightFormat::q5_0>{});
    case WeightFormat::q5_1: return f(FormatTag<WeightFormat::q5_1>{});
    case WeightFormat::q4_k: return f(FormatTag<WeightFormat::q4_k>{});
    case WeightFormat::q5_k: return f(FormatTag<WeightFormat::q5_k>{});
    case WeightFormat::q6_k: return f(FormatTag<WeightFormat::q6_k>{});
  }
}

}  // namespace stretto
