// Shared by the bindings of attention over plain tensors [batch, rows, heads, head_dim].
#pragma once
#include "bind/bind.h"
#include "kernels/attention/dense_attention.h"

namespace stretto {

inline RowStrides row_strides(const TensorView& t) { return {t.strides[0], t.strides[1], t.strides[2]}; }

inline void require_rows(const TensorView& t, const char* op, const char* argument, DType dtype) {
  require(t.ndim == 4 && t.dtype == dtype && t.contiguous_from(3) && !t.cuda, op, argument,
          std::string("expected ") + dtype_name(dtype) + " [batch, rows, heads, head_dim] with adjacent elements on CPU");
}

struct AttentionSizes { int64_t batch, q_len, k_len, heads, kv_heads, head_dim; };

// q, k, v, out and lse fit each other.
inline AttentionSizes require_attention(const char* op, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                                        const TensorView& lse) {
  require_rows(q, op, "q", q.dtype);
  require_rows(k, op, "k", q.dtype);
  require_rows(v, op, "v", q.dtype);
  require_rows(out, op, "out", q.dtype);
  const AttentionSizes n{q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]};
  for (int i = 0; i < 4; ++i) {
    require(k.shape[i] == v.shape[i], op, "v", "does not match k");
    require(out.shape[i] == q.shape[i], op, "out", "does not match q");
  }
  require(k.shape[0] == n.batch && k.shape[3] == n.head_dim && n.kv_heads > 0 && n.heads % n.kv_heads == 0, op, "k", "does not match q");
  require(n.q_len < (int64_t(1) << 31) && n.k_len < (int64_t(1) << 31), op, "q, k", "more than 2^31 rows");
  require_tensor(lse, op, "lse", DType::f32, {n.batch, n.q_len, n.heads});
  return n;
}

}  // namespace stretto
