// draw: one token per row of probabilities (or of any non-negative weights: only ratios matter).
//   inverse  the first token at which the running sum exceeds u * total, u from (seed, lineage; position, purpose)
//   gumbel   argmax of log p(x) + g(x), g(x) = -log(-log u(x)) from (seed, lineage; position, purpose, x); ties to the lowest id.
//            Computed as argmin of -log u(x) / p(x), the same order; the logarithm is taken only where 1 - u(x) <= -log u(x) can win.
// Sums in double. A token of weight 0 is never drawn. A row with NaN, +inf or a negative entry, or without mass, gives -1.
// Bytes: rows * width * 4 (inverse reads the row once and one chunk of it again).
#pragma once
#include "common/isa.h"
#include "common/philox.h"
#include "common/tensor_view.h"

namespace stretto {
struct DrawParams {
  const float* p;                 // [rows, width], rows stride apart
  const int64_t *seed, *lineage;  // [rows]
  const int32_t* pos;             // [rows]: the position of the token that is drawn
  int32_t* out;                   // [rows]
  const int32_t* num_rows;        // null, or [1]
  int64_t rows, width, stride;
  Purpose purpose;
  bool gumbel;
};
STRETTO_CPU_KERNEL(draw, DrawParams)
}  // namespace stretto
