// Shared by the bindings of attention over plain tensors [batch, rows, heads, head_dim].
#pragma once
#include "bind/bind.h"
#include "kernels/attention/attention_tensors.h"

namespace stretto {

inline RowStrides row_strides(const TensorView& t) { return {t.strides[0], t.strides[1], t.strides[2]}; }

inline void require_rows(const TensorView& t, const char* op, const char* argument, DType dtype) {
  require(t.ndim == 4 && t.dtype == dtype && t.contiguous_from(3) && !t.cuda, op, argument,
          std::string("expected ") + dtype_name(dtype) + " [batch, rows, heads, head_dim] with adjacent elements on CPU");
}

inline void require_same_shape(const TensorView& t, const TensorView& as, const char* op, const char* argument) {
  for (int i = 0; i < 4; ++i)
    require(t.shape[i] == as.shape[i], op, argument,
            "size " + std::to_string(t.shape[i]) + " in dimension " + std::to_string(i) + ", expected " + std::to_string(as.shape[i]));
}

// q and k fit each other, and lse fits q. v and out are for the caller to add.
inline AttentionTensors query_tensors(const char* op, const TensorView& q, const TensorView& k, const TensorView& lse, float scale, float softcap) {
  require_rows(q, op, "q", q.dtype);
  require_rows(k, op, "k", q.dtype);
  AttentionTensors t{};
  t.q = q.data(), t.k = k.data(), t.lse = lse.data<float>();
  t.batch = q.shape[0], t.q_len = q.shape[1], t.heads = q.shape[2], t.head_dim = q.shape[3];
  t.k_len = k.shape[1], t.kv_heads = k.shape[2];
  t.q_strides = row_strides(q), t.k_strides = row_strides(k);
  t.scale = scale, t.softcap = softcap, t.dtype = q.dtype;
  require(k.shape[0] == t.batch && k.shape[3] == t.head_dim && t.kv_heads > 0 && t.heads > 0 && t.heads % t.kv_heads == 0, op, "k",
          "does not match q");
  require(t.q_len < (int64_t(1) << 31) && t.k_len < (int64_t(1) << 31), op, "q, k", "more than 2^31 rows");
  require_tensor(lse, op, "lse", DType::f32, {t.batch, t.q_len, t.heads});
  return t;
}

inline AttentionTensors attention_tensors(const char* op, const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
                                          const TensorView& lse, float scale, float softcap) {
  AttentionTensors t = query_tensors(op, q, k, lse, scale, softcap);
  require_rows(v, op, "v", q.dtype);
  require_rows(out, op, "out", q.dtype);
  require_same_shape(v, k, op, "v");
  require_same_shape(out, q, op, "out");
  t.v = v.data(), t.out = out.data();
  t.v_strides = row_strides(v), t.out_strides = row_strides(out);
  return t;
}

}  // namespace stretto
