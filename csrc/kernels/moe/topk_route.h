// topk_route: which k experts each token visits, and with what weights.
//   score = softmax(logits) or 1 / (1 + e^-logits);  choice = score + bias (logits themselves where neither bias nor groups are given)
//   groups: only experts of the `top_groups` groups with the largest sum of their `group_top` best choices can be chosen
//   experts = the k largest choices, largest first, equal ones by lowest id;  weight = score, divided by the sum of the k with
//   `renormalise`, times `scale`
// NaN and -inf in a choice rank as the lowest finite float, so ids are always legal; the weights of a row with NaN (softmax: anywhere in
// the row, also +inf) are NaN. Rows are independent: sums in 16 lanes and a fixed tree. Bytes: logits once, 8 k a token.
// Sources: Mixtral arXiv 2401.04088, DeepSeek-V3 arXiv 2412.19437 (sigmoid, selection bias, groups), V2 arXiv 2405.04434.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct TopkRouteParams {
  const void* logits;       // [tokens, experts] of dtype, rows logits_stride apart
  const float* bias;        // null, or [experts]
  float* weights;           // [tokens, k]
  int32_t* chosen;          // [tokens, k]
  const int32_t* num_rows;  // null, or [1]: only rows below it are read and written
  int64_t tokens, experts, k, logits_stride;
  int64_t groups, top_groups, group_top;  // groups divide experts; 1 <= group_top <= 2; k <= top_groups * experts / groups
  float scale;
  bool sigmoid, renormalise;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(topk_route, TopkRouteParams)
}  // namespace stretto
