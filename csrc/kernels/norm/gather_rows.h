// gather_rows: out[i] = x[rows[i]]; a row out of range becomes zeros. Bytes: 2 * count * width * 4.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct GatherRowsParams {
  const float* x;           // [num_x, width], rows x_stride apart
  const int32_t* rows;      // [count]
  float* out;               // [count, width], rows out_stride apart; overlaps no input
  const int32_t* num_rows;  // null, or [1]: only out rows below it are written
  int64_t num_x, count, width, x_stride, out_stride;
};
STRETTO_CPU_KERNEL(gather_rows, GatherRowsParams)
}  // namespace stretto
