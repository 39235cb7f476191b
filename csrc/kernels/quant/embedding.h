// embedding: out[r, :] = scale * w[ids[r], :], the weight rows dequantised as the file's format defines. An id out of range gives zeros.
#pragma once
#include "common/isa.h"
#include "kernels/quant/formats.h"

namespace stretto {
struct EmbeddingParams {
  const int32_t* ids;       // [rows]
  const uint8_t* packed;    // as formats.h
  float* out;               // [rows, k], rows out_stride apart
  const int32_t* num_rows;  // null, or [1]: only rows below it are read and written
  int64_t rows, n, k, out_stride;
  float scale;
  WeightFormat format;
};
STRETTO_CPU_KERNEL(embedding, EmbeddingParams)
}  // namespace stretto
