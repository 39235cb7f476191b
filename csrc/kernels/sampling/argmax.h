// argmax: out[r] = the lowest id among the largest entries of logits[r, :].
// A row with NaN or +inf, or without any finite entry, gives -1. -inf is a forbidden token, not a fault; status tells (RowStatus).
// Bytes: rows * width * 4.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
enum RowStatus : int32_t {
  kRowFinite = 0,
  kRowMasked = 1,       // holds -inf and something finite: usable
  kRowBroken = 2,       // NaN, +inf, or nothing finite: no token comes out of it
  kRowBadArgument = 3,  // a parameter of this row is out of range
};
struct ArgmaxParams {
  const float* logits;      // [rows, width], rows stride elements apart
  int32_t* out;             // [rows]
  int32_t* status;          // null, or [rows] of RowStatus
  const int32_t* num_rows;  // null, or [1]: only rows below it are read and written
  int64_t rows, width, stride;
};
STRETTO_CPU_KERNEL(argmax, ArgmaxParams)
}  // namespace stretto
