// Block rows of a file, into groups of 16 rows (kernels/quant/formats.h). One pass, no buffer beyond source and destination.
#pragma once
#include "kernels/quant/formats.h"

namespace stretto {

// Rows [0, rows) of raw go to packed rows first + i * 1, or, interleaved, to groups `part`, part + 2, part + 4, ... of the result.
struct PackParams {
  const uint8_t* raw;  // [rows, k / unit * raw_bytes], contiguous
  uint8_t* packed;
  int64_t rows, k;
  int64_t first;  // row of the packed matrix that raw's first row becomes
  int part;       // -1: consecutive rows; 0, 1: this matrix of an interleaved pair (first is 0)
  WeightFormat format;
};
void pack_rows(const PackParams& p);

// Rows [n, 16 ceil(n / 16)) of the last group.
void pack_padding(uint8_t* packed, int64_t n, int64_t k, WeightFormat format);

}  // namespace stretto
