// Moves inside a paged key-value cache, every layer in one call.
//   copy_pages: page dst[i] := page src[i]        (copy on write of a shared page)
//   move_rows:  row  dst[i] := row  src[i]        (accepted draft rows to the places behind the committed ones)
// Pairs are done in order, so a row that was written by an earlier pair is read as written. A pair with a negative or too large
// id is skipped. Payload is never interpreted: NaN stays as it is. Bytes: pairs * 2 * bytes of a page or row over all layers.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {

// One tensor [layers, pages, heads, outer, page_size, inner]: keys have outer = head_dim and inner = 1, values outer = 1 and
// inner = head_dim, scales of int8 rows 1 and 1. A page of a layer is dense; layers and pages are any distance apart.
struct CachePlane {
  char* base;  // null: not there
  int64_t outer, inner, element_bytes;
  int64_t layer_stride, page_stride;  // in elements
};

struct CacheMoveParams {
  CachePlane planes[4];  // keys, values, key scales, value scales
  const int32_t* src;    // [pairs] page ids, or slots page * page_size + offset
  const int32_t* dst;    // [pairs]
  int64_t pairs, layers, pages, heads, page_size;
};
STRETTO_CPU_KERNEL(copy_pages, CacheMoveParams)
STRETTO_CPU_KERNEL(move_rows, CacheMoveParams)

}  // namespace stretto
