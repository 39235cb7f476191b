// selective_scan (Mamba-1): per channel c with group g = c / (channels / groups) and state n,
//   delta = softplus(dt + dt_bias) (without softplus: dt + dt_bias)
//   h[c, n] = exp(delta A[c, n]) h[c, n] + delta u[c] B[g, n];   y[c] = (sum_n C[g, n] h[c, n] + D[c] u[c]) * silu(z[c])
// over packed sequences. States are float. exp is 2^x with x = delta (A log2 e) rounded once; a factor below 2^-125.9 is 0.
// Each channel is a lane and n ascends, so the bits of a row depend on its own sequence only, and the sequence form, steps (any number of
// rows), trees and replay agree to the bit for any split. NaN stays in its channel, or group where B or C is NaN, from its row on.
// An empty sequence returns the state it was given.
// Bytes: tokens * (channels * (3 or 4) + 2 * groups * states) * sizeof(T) + batch * channels * states * 8. Bound by the exponentials:
// tokens * channels * states of them. Source: arXiv 2312.00752.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
// What sequence, step and replay read alike. Rows are *_stride elements apart and dense inside.
struct SelectiveScanInputs {
  const void *u, *dt;        // [tokens, channels] of dtype
  const void *b, *c;         // [tokens, groups, states] of dtype; c null: no outputs
  const void* z;             // null, or [tokens, channels] of dtype
  const float* a;            // [channels, states], any strides
  const float *d, *dt_bias;  // null, or [channels]
  int64_t tokens, channels, states, groups;
  int64_t u_stride, dt_stride, b_stride, c_stride, z_stride, a_strides[2];
  bool softplus;
  DType dtype;  // f32, f16, bf16
};

struct SelectiveScanParams {
  SelectiveScanInputs in;
  const float* h0;            // null: zeros, or [batch, channels, states], any strides
  const int32_t* cu_seqlens;  // [batch + 1], 0 = first <= ... <= last = tokens
  void* y;                    // [tokens, channels] of dtype, rows y_stride apart; overlaps no input
  float* h_last;              // [batch, channels, states], dense; overlaps no input
  int64_t batch, y_stride, h0_strides[3];
};
STRETTO_CPU_KERNEL(selective_scan, SelectiveScanParams)

// The step; slots, cu_seqlens, parent and update as in causal_conv1d.h.
struct SelectiveScanStepParams {
  SelectiveScanInputs in;
  float* state;               // [slots, channels, states], any strides
  const int32_t* slots;       // null, or [batch]
  const int32_t* cu_seqlens;  // null, or [batch + 1]
  const int32_t* parent;      // null, or [tokens]
  void* y;                    // [tokens, channels] of dtype
  int64_t batch, num_slots, y_stride, state_strides[3];
  bool update;
};
STRETTO_CPU_KERNEL(selective_scan_step, SelectiveScanStepParams)

// Replay: state after the rows[b, 0 .. n[b]) of the inputs.
struct SelectiveScanReplayParams {
  SelectiveScanInputs in;  // c, z and d are not read
  float* state;
  const int32_t *rows, *n, *slots;  // [batch, max_rows], [batch], null or [batch]
  int64_t batch, max_rows, num_slots, state_strides[3];
};
STRETTO_CPU_KERNEL(selective_scan_replay, SelectiveScanReplayParams)
}  // namespace stretto
