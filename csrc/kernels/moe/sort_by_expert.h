// sort_by_expert: which row of a matrix sorted by expert each (token, slot) pair takes. Stable: pairs of one expert keep their order.
//   counts[e] = number of pairs with expert e;  offsets[e + 1] = offsets[e] + counts[e] rounded up to `multiple`
//   rows[i] = offsets[e_i] + number of earlier pairs with e_i;  pairs[rows[i]] = i;  padding rows and those from offsets[experts] on: -1
// A pair whose expert is out of range (-1 by convention) goes nowhere: its row is -1. Integers only, so the result is the same for any
// number of threads. Bytes: 4 (3 pairs + padded rows) + 8 experts.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct SortByExpertParams {
  const int32_t* chosen;  // [num_pairs]
  int32_t* counts;        // [experts]
  int32_t* offsets;       // [experts + 1]
  int32_t* pairs;         // [capacity]
  int32_t* rows;          // [num_pairs]
  int64_t num_pairs, experts, multiple;
  int64_t capacity;  // at least num_pairs + min(num_pairs, experts) * (multiple - 1)
};
STRETTO_CPU_KERNEL(sort_by_expert, SortByExpertParams)
}  // namespace stretto
