// vertical_slash: lists of keys for sparse_prefill from vertical lines (keys that every later query sees) and slashes (distances at which
// every query sees a key). A block of queries at positions a .. b sees key interval [a - o, b - o) for each slash o, joined where they touch,
// and each vertical below b that no interval holds.
// Called twice: to count, it writes the counts of each block to the pointers' places [b + 1]; then, with the pointers summed up, it writes the
// lists. Source: arXiv 2407.02490.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct VerticalSlashParams {
  const int32_t* verticals;            // [lists, num_verticals], growing, each in 0 .. k_len - 1
  const int32_t* slashes;              // [lists, num_slashes], growing, at least 0
  int32_t *interval_ptr, *column_ptr;  // [lists, blocks + 1]
  int32_t *intervals, *columns;        // [n, 2] and [n]; not touched when counting
  bool count;
  int64_t lists, num_verticals, num_slashes, blocks, block, q_len, k_len;
};
STRETTO_CPU_KERNEL(vertical_slash, VerticalSlashParams)
}  // namespace stretto
