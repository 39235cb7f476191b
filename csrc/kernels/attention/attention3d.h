// attention3d: attention over a grid of tokens (frames, rows, columns), in the network's own layout [batch, t * h * w, heads, head_dim].
// The queries are the last q_frames of k_frames frames. Along each axis a query at i of n keys sees, with window w and stride s,
//   exactly w keys around c = clamp(min(i / s * s + s / 2, n - 1), w / 2, n - 1 - (w / 2 - 1 + w % 2)):   c - w / 2 .. c + w / 2 - 1 + w % 2
// so that at borders the window moves inwards: s = 1 is neighbourhood attention, s = w blocks; k odd tiles of s are the window k * s.
// Causal in time: frames up to its own, less than w before min(i / s * s + s - 1, n - 1).
// With `frames`, keys and values are a pool of frames in any order: frames[b, f] is the place of frame f of batch entry b.
// With `rotation` [k_frames * h * w, head_dim] queries and keys are rotated as they are loaded (pairs 2 i, 2 i + 1; cosines, then sines).
// Full attention has the bits of dense_attention. With windows the order of keys is that of the block of queries, fixed by grid, window and
// heads: a row's bits do not depend on the batch, other heads or threads. FLOPs: 4 * heads * head_dim for each query and key it sees.
// Source: arXiv 2204.07143 (neighbourhoods), 2502.04507 (tiles).
#pragma once
#include "kernels/attention/attention_tensors.h"

namespace stretto {
struct GridAxis {
  int64_t queries, keys;   // along the axis; queries are the last of keys
  int64_t window, stride;  // window 0: all
  bool causal;
};

struct Attention3dParams {
  AttentionTensors t;  // q_len = q_frames * h * w; k_len = rows of k
  GridAxis frames, rows, columns;
  const int32_t* frame_index;  // null, or [batch, frames.keys]; k and v have one batch entry then
  const float* rotation;       // null, or [frames.keys * h * w, head_dim]
};
STRETTO_CPU_KERNEL(attention3d, Attention3dParams)
}  // namespace stretto
