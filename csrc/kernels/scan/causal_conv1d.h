// causal_conv1d: y[t, c] = act(bias[c] + sum_k weight[c, k] * x[t - K + 1 + k, c]) over packed sequences; act is silu or nothing.
// Inputs before a sequence's first token come from `initial` (zeros without it); `final` is the last K - 1 inputs of each sequence,
// older ones from `initial` where the sequence is shorter: an empty sequence returns what it was given.
// Sums in float, bias first and then k ascending, each channel in its own lane: a row's bits depend on its own window only, so any
// split of a sequence, the step form (any number of rows) and replay agree to the bit. NaN reaches the K rows of its own channel.
// Bytes: tokens * channels * 2 * sizeof(T) + channels * (K + 1) * 4. Source: arXiv 2312.00752.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct CausalConv1dParams {
  const void* x;              // [tokens, channels] of dtype; rows x_stride elements apart
  const float* weight;        // [channels, width] with strides of its own: channels side by side are read fastest
  const float* bias;          // null, or [channels]
  const float* initial;       // null, or [batch, channels, width - 1] with strides of their own
  const int32_t* cu_seqlens;  // [batch + 1], 0 = first <= ... <= last = tokens
  void* y;                    // [tokens, channels] of dtype; overlaps no input
  float* final;               // [batch, channels, width - 1], dense; overlaps no input
  int64_t tokens, channels, width, batch, x_stride, y_stride;
  int64_t weight_strides[2], initial_strides[3];
  bool silu;
  DType dtype;  // f32, f16, bf16
};
STRETTO_CPU_KERNEL(causal_conv1d, CausalConv1dParams)

// The step: rows that continue the sequences whose last inputs stand in `state`. Row t of a sequence follows row parent[t] of it
// (counted from the sequence's first row; negative: the state itself), or the row before where parent is null.
// Ids out of range are harmless: a slot makes its sequence idle (zero rows, no state), a parent not before its row counts as -1.
struct CausalConv1dStepParams {
  const void* x;              // [tokens, channels]
  float* state;               // [slots, channels, width - 1]; read, and written where `update` is set
  const float* weight;        // [channels, width]
  const float* bias;          // null, or [channels]
  const int32_t* slots;       // null: sequence b has slot b; or [batch], negative: idle. No slot twice where `update` is set
  const int32_t* cu_seqlens;  // null: one row each; or [batch + 1]; rows outside all sequences are left alone
  const int32_t* parent;      // null, or [tokens]; only without `update`
  void* y;                    // [tokens, channels]
  int64_t tokens, channels, width, batch, num_slots, x_stride, y_stride;
  int64_t weight_strides[2], state_strides[3];
  bool silu, update;
  DType dtype;
};
STRETTO_CPU_KERNEL(causal_conv1d_step, CausalConv1dStepParams)

// Replay: the state after the inputs rows[b, 0 .. n[b]), as if they had been stepped through. Rows out of range end the list.
struct CausalConv1dReplayParams {
  float* state;          // [slots, channels, width - 1], in place
  const void* x;         // [inputs, channels]
  const int32_t* rows;   // [batch, max_rows]
  const int32_t* n;      // [batch]
  const int32_t* slots;  // as in the step
  int64_t inputs, channels, width, batch, max_rows, num_slots, x_stride;
  int64_t state_strides[3];
  DType dtype;
};
STRETTO_CPU_KERNEL(causal_conv1d_replay, CausalConv1dReplayParams)
}  // namespace stretto
