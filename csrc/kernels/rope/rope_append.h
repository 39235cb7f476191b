// rope append: for each row of a step, rotates its queries in place and writes its rotated keys and its values into the pages.
//   pair (a, b) of a head at position t: (a cos - b sin, b cos + a sin); pairs (2i, 2i + 1) or (i, i + rotary_dim / 2)
// Queries and keys go through an RMS norm per head first where weights for it are given (Qwen3, Gemma 3). Keys in qkv are left alone.
// int8 pages: one scale per (row, kv head), largest magnitude / 127, for keys and for values; a row that is not finite gets scale NaN.
// A slot outside the pool writes nothing; a position outside the table takes the nearest. A row depends on nothing but itself.
// Bytes: rows * ((2 heads + 2 kv_heads) * head_dim * 4 + 2 kv_heads * head_dim * sizeof(T)).
// Source: arXiv 2104.09864.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct RopeAppendParams {
  float* qkv;                    // [rows, (heads + 2 kv_heads) * head_dim], rows row_stride apart
  const int32_t* positions;      // [rows]
  const int32_t* slots;          // [rows], page * page_size + offset, or -1: write nothing
  const float* cos_sin;          // [max_positions, rotary_dim]: cosines of the pairs, then sines
  const float *q_norm, *k_norm;  // null, or [head_dim]
  void* k_pages;                 // [pages, kv_heads, head_dim, page_size] of dtype
  void* v_pages;                 // [pages, kv_heads, page_size, head_dim] of dtype; pages k_page and v_page apart, each dense
  float *k_scales, *v_scales;    // int8: [pages, kv_heads, page_size], pages k_scale_page and v_scale_page apart
  const int32_t* num_rows;       // null, or [1]
  int64_t rows, heads, kv_heads, head_dim, rotary_dim, row_stride, max_positions, pages, page_size;
  int64_t k_page, v_page, k_scale_page, v_scale_page;
  float norm_eps;
  bool interleaved;
  DType dtype;  // of the pages: f32, f16, bf16, i8
};
inline constexpr int64_t kMaxHeadDim = 1024;
STRETTO_CPU_KERNEL(rope_append, RopeAppendParams)
}  // namespace stretto
