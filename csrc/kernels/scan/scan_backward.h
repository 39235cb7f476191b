// Gradients of causal_conv1d.h and selective_scan.h. Nothing is kept from the forward pass: states are computed anew from one every 32 rows,
// so memory beyond the results is 1 / 32 of the states of the channels in work.
// Channels are lanes and a task owns its channels through all sequences, so sums over rows have one order. Sums over channels (B, C) are
// made in up to kScanParts parts of a group that depend on sizes only; the caller adds the parts.
#pragma once
#include "kernels/scan/causal_conv1d.h"
#include "kernels/scan/selective_scan.h"

namespace stretto {
struct CausalConv1dBackwardParams {
  CausalConv1dParams in;              // y and final are not read
  const void* dy;                     // [tokens, channels] of dtype
  const float* dfinal;                // [batch, channels, width - 1], dense
  void* dx;                           // [tokens, channels] of dtype, dense
  float *dweight, *dbias, *dinitial;  // [channels, width], [channels], [batch, channels, width - 1], dense
  int64_t dy_stride;
};
STRETTO_CPU_KERNEL(causal_conv1d_backward, CausalConv1dBackwardParams)

constexpr int64_t kScanParts = 16;
// Parts that the channels of a group are cut into: 16 tasks or more in all where there are channels enough.
static inline __attribute__((always_inline)) int64_t scan_parts(int64_t channels, int64_t groups) {
  const int64_t blocks = groups ? (channels / groups + 15) / 16 : 0, wish = groups ? (kScanParts + groups - 1) / groups : 1;
  return blocks < wish ? (blocks ? blocks : 1) : wish;
}

struct SelectiveScanBackwardParams {
  SelectiveScanInputs in;
  const float* h0;            // null, or [batch, channels, states], any strides
  const int32_t* cu_seqlens;  // [batch + 1]
  const void* dy;             // [tokens, channels] of dtype
  const float* dlast;         // [batch, channels, states], dense
  void *du, *ddt, *dz;        // [tokens, channels] of dtype, dense; dz null without z
  float *da, *dd, *dbias;     // [channels, states], [channels], [channels]
  float *db, *dc;             // [parts, tokens, groups, states], dense
  float* dh0;                 // [batch, channels, states], dense
  int64_t batch, dy_stride, h0_strides[3];
};
STRETTO_CPU_KERNEL(selective_scan_backward, SelectiveScanBackwardParams)
}  // namespace stretto
