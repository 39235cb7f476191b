// noise: the numbers behind draw and verify, one row each.
//   uniform: out [rows] double in [0, 1);  gumbel: out [rows, width] double, -log(-log u) for each token id
#pragma once
#include "common/isa.h"
#include "common/philox.h"
#include "common/tensor_view.h"

namespace stretto {
struct NoiseParams {
  const int64_t *seed, *lineage;  // [rows]
  const int32_t* pos;             // [rows]
  double* out;
  int64_t rows, width;  // width 0: uniforms
  Purpose purpose;
  uint32_t index;  // uniforms: which one of this position and purpose
};
STRETTO_CPU_KERNEL(noise, NoiseParams)
}  // namespace stretto
