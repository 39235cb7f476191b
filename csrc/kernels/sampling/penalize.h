// penalize: what a request's own history does to its next logits, in place. For each distinct token t of the row's history, seen c times:
//   l(t) = l(t) > 0 ? l(t) / repetition : l(t) * repetition;   l(t) -= presence + frequency * c
// then l(id) += value for each bias entry (-inf forbids). Ids outside [0, width) are skipped (-1 is padding).
// Source of the repetition rule: arXiv 1909.05858, section 4.1. Bytes: 8 per history token and per bias entry.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct PenalizeParams {
  float* logits;                                   // [rows, width], rows stride apart
  const int32_t* history;                          // [rows, history_width], or [total] with cu_history
  const int32_t* cu_history;                       // null, or [rows + 1]
  const float *repetition, *presence, *frequency;  // [rows]; 1, 0, 0 change nothing
  const int32_t *bias_ids, *cu_bias;               // null, or [total_bias] and [rows + 1]
  const float* bias_values;                        // [total_bias]
  const int32_t* num_rows;                         // null, or [1]
  int64_t rows, width, stride, history_width, total_history, total_bias;
};
STRETTO_CPU_KERNEL(penalize, PenalizeParams)
}  // namespace stretto
