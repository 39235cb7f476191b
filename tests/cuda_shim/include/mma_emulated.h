// Tensor-core instructions lane by lane, from the fragment layouts of the PTX ISA (see common/mma.cuh).
#pragma once
#include <cstring>

#include "cuda_runtime.h"

namespace stretto_shim {

template <class ToFloat>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const ToFloat& to_float, int line = __builtin_LINE()) {
  struct In {
    uint32_t a[4], b[2];
    float c[4];
  } in;
  std::memcpy(in.a, a, sizeof in.a);
  std::memcpy(in.b, b, sizeof in.b);
  std::memcpy(in.c, c, sizeof in.c);
  struct Out { float c[4]; };
  const auto half = [&](uint32_t word, int high) { return to_float(static_cast<uint16_t>(word >> 16 * high)); };
  const Out out = exchange<Out>(
      "mma.sync", 0xffffffffu, in,
      [&](int lane, const In* const* lanes) {
        Out r;
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
          float sum = lanes[lane]->c[i];
          for (int k = 0; k < 16; ++k) {
            const In& from_a = *lanes[row % 8 * 4 + k % 8 / 2];
            const In& from_b = *lanes[column * 4 + k % 8 / 2];
            sum += half(from_a.a[row / 8 + k / 8 * 2], k % 2) * half(from_b.b[k / 8], k % 2);
          }
          r.c[i] = sum;
        }
        return r;
      },
      line);
  std::memcpy(c, out.c, sizeof out.c);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a row that is not aligned to 16 bytes");
  if (!in_shared_memory(row, 16)) fail("ldmatrix outside shared memory");
  struct Out { uint32_t r[4]; };
  const Out out = exchange<Out>(
      "ldmatrix", 0xffffffffu, row,
      [&](int lane, const void* const* const* rows) {
        Out result;
        for (int m = 0; m < 4; ++m) {
          const auto element = [&](int i, int j) { return uint32_t(static_cast<const uint16_t*>(*rows[m * 8 + i])[j]); };
          const int i = lane / 4, j = lane % 4 * 2;
          result.r[m] = transposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
        }
        return result;
      },
      line);
  std::memcpy(r, out.r, sizeof out.r);
}

}  // namespace stretto_shim
