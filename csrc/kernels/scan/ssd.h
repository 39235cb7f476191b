// ssd (Mamba-2, state space duality): per head with group g = head / (heads / groups), delta = softplus(dt + dt_bias) (or without softplus),
//   H[p, n] = exp(delta A) H[p, n] + delta x[p] B[g, n];   y[p] = (sum_n H[p, n] C[g, n] + D x[p]) * silu(z[p])
// over packed sequences. States are float.
// Two forms. Steps, trees, replay and any number of rows through ssd_step: row by row, n in 16 lanes and one fixed tree of additions; they
// agree to the bit. The sequence form works in chunks of `chunk` rows counted from the sequence's first row: inside a chunk with products
// of matrices, Y = (L * C B^T) (delta x) + exp(cs) C H, L[i, j] = exp(cs_i - cs_j) for j <= i, cs = cumsum(delta A); it rounds otherwise. A
// sequence cut at multiples of `chunk` gives the same bits as in one piece.
// cs is summed in double and kept as an integer and a fraction of log2, so that differences keep the precision of a float.
// NaN stays in its head (its group's heads, from B or C), from its row on. An empty sequence returns the state it was given.
// FLOPs of the chunk form: tokens * heads * dim * (4 * states + chunk), and tokens * groups * states * chunk. Source: arXiv 2405.21060.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {
struct SsdInputs {               // rows are *_stride elements apart and dense inside
  const void* x;                 // [tokens, heads, dim] of dtype
  const void* dt;                // [tokens, heads] of dtype
  const void *b, *c;             // [tokens, groups, states] of dtype; c null: no outputs
  const void* z;                 // null, or like x
  const float *a, *d, *dt_bias;  // [heads]; d and dt_bias may be null
  int64_t tokens, heads, dim, states, groups;
  int64_t x_stride, dt_stride, b_stride, c_stride, z_stride;
  bool softplus;
  DType dtype;  // f32, f16, bf16
};

struct SsdParams {
  SsdInputs in;
  const float* h0;            // null: zeros, or [batch, heads, dim, states], any strides
  const int32_t* cu_seqlens;  // [batch + 1], 0 = first <= ... <= last = tokens
  void* y;                    // [tokens, heads, dim] of dtype, dense; overlaps no input
  float* h_last;              // [batch, heads, dim, states], dense
  int64_t batch, chunk, h0_strides[4];
};
STRETTO_CPU_KERNEL(ssd, SsdParams)

// slots, cu_seqlens, parent and update as in causal_conv1d.h.
struct SsdStepParams {
  SsdInputs in;
  float* state;  // [slots, heads, dim, states], any strides
  const int32_t *slots, *cu_seqlens, *parent;
  void* y;  // [tokens, heads, dim] of dtype, dense
  int64_t batch, num_slots, state_strides[4];
  bool update;
};
STRETTO_CPU_KERNEL(ssd_step, SsdStepParams)

struct SsdReplayParams {
  SsdInputs in;  // c, z and d are not read
  float* state;
  const int32_t *rows, *n, *slots;  // [batch, max_rows], [batch], null or [batch]
  int64_t batch, max_rows, num_slots, state_strides[4];
};
STRETTO_CPU_KERNEL(ssd_replay, SsdReplayParams)
}  // namespace stretto
