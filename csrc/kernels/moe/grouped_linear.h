// grouped_linear: out[r] = epilogue(x[r] w_e^T) for the rows r of offsets[e] .. offsets[e + 1] - 1, one packed weight an expert.
// Each group is a `linear` of kernels/quant/linear.h, and its rows have the bits that one gives. Rows from offsets[experts] on become
// zeros. Offsets that decrease or point outside give empty or shorter groups, never an access out of bounds.
// Bytes: the weights of experts with rows, once for up to 8 rows; x and out once. Operations: 2 rows n k.
#pragma once
#include "kernels/quant/linear.h"

namespace stretto {
struct GroupedLinearParams {
  LinearParams all;               // x, out, rows, n, k, strides, format, gate; packed: that of expert 0; no bias, residual or num_rows
  const int32_t* offsets;         // [experts + 1]
  int64_t experts, packed_bytes;  // bytes from one expert's weight to the next
};
STRETTO_CPU_KERNEL(grouped_linear, GroupedLinearParams)
}  // namespace stretto
