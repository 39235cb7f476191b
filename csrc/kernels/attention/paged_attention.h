// paged attention: out[i, h] = sum_j softmax_j(scale q[i, h] . K[j, h / group]) V[j, h / group] over the keys j that row i sees.
// Prefill chunk, decode, and trees of draft tokens are the same call.
//
// A row's bits depend on its own query and keys alone: not on other rows, the page size, chunks, splits or threads, nor on whether
// it came as a chain or as a tree node. The order of its arithmetic is fixed by absolute positions:
//   keys in splits of kSplit positions; a score is one lane's fma chain over d, starting at 0, on the scaled query; per split the
//   exact maximum m, weights e^(score - m), their sum l in 16 lanes (lane = position mod 16) and a fixed tree, and
//   acc[d] = fma chain over the keys in order of position; splits are joined in order by merge() of attention_row.h.
// A node of a tree stands in the slot of position cached + index, but its own position is cached + depth: its ancestors' scores and
// values are walked at positions cached, cached + 1, ..., so it has the bits of plain decoding along the same path.
//
// Hidden keys are never multiplied: weights of hidden lanes are exactly 0 and their values are not read, so memory beyond the rows
// in use may hold anything. A row that sees nothing becomes zeros. A NaN in a visible key or value makes the row NaN.
// Page ids outside the pool are clamped into it; positions beyond the table's last page are not seen; a tree row outside `mask`
// sees the prefix only.
// Bytes: each visible key and value once per kv head and block of rows. FLOPs: 4 * head_dim for each (row, head, visible key).
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct PagedAttentionParams {
  const float* q;         // [rows, heads, head_dim], strides q_row, q_head; elements contiguous
  const void* k_pages;    // [pages, kv_heads, head_dim, page_size] of dtype: a key is a column, so that keys are lanes
  const void* v_pages;    // [pages, kv_heads, page_size, head_dim] of dtype; pages k_page and v_page apart, each dense
  const float* k_scales;  // int8: [pages, kv_heads, page_size], pages k_scale_page apart, value = int8 * scale; else null
  const float* v_scales;
  const int32_t* table;       // [seqs, table_width]: page of each page_size positions
  const int32_t* cu_q;        // [seqs + 1]: sequence r owns rows cu_q[r] .. cu_q[r + 1]
  const int32_t* cached;      // [seqs]: keys before this launch's rows
  const int32_t* num_seqs;    // null, or [1]: sequences in use
  const uint64_t* mask;       // null, or [mask_rows, mask_words]: bit j of a tree row: node j is an ancestor or itself
  const int32_t* mask_start;  // null, or [seqs]: the sequence's first row in mask; -1: causal
  float* out;                 // [rows, heads, head_dim], rows out_row apart; overlaps no input. Rows of no sequence are left alone
  int64_t rows, heads, kv_heads, head_dim, pages, page_size, seqs, table_width, mask_rows, mask_words;
  int64_t q_row, q_head, out_row;
  int64_t k_page, v_page, k_scale_page, v_scale_page;
  int64_t window;  // a row at position p sees positions > p - window; 0: all
  float scale;
  float softcap;  // scores become softcap * tanh(score / softcap); 0: none
  DType dtype;    // f32, f16, bf16, i8
};
STRETTO_CPU_KERNEL(paged_attention, PagedAttentionParams)
}  // namespace stretto
