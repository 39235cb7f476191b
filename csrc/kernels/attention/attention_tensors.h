// Queries, keys, values and results of attention over plain tensors, as every op of that kind takes them. Members are always inlined: kernels
// of all instruction sets include this, and none of their code may be shared by the linker.
#pragma once
#include "common/isa.h"
#include "common/tensor_view.h"

namespace stretto {

// [batch, rows, heads, head_dim] in elements, head_dim adjacent.
struct RowStrides {
  int64_t batch, row, head;
  [[gnu::always_inline]] int64_t at(int64_t b, int64_t r, int64_t h) const { return b * batch + r * row + h * head; }
};

struct AttentionTensors {
  const void *q, *k, *v;  // of dtype; k and v have kv_heads heads, of which each serves heads / kv_heads consecutive ones of q
  void* out;              // as q, overlaps no input
  float* lse;             // [batch, q_len, heads], contiguous: natural log of the sum of exponentials
  int64_t batch, q_len, k_len, heads, kv_heads, head_dim;
  RowStrides q_strides, k_strides, v_strides, out_strides;
  float scale, softcap;  // scores become softcap * tanh(scale * score / softcap); softcap 0: none
  DType dtype;           // f32, f16, bf16

  [[gnu::always_inline]] int64_t group() const { return heads / kv_heads; }
};

}  // namespace stretto
