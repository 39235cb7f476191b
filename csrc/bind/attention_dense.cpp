#include "bind/attention_rows.h"
#include "kernels/attention/dense_attention.h"

namespace stretto {
namespace {

// A growing list of row numbers, from 0 to at most `rows`.
void require_offsets(const TensorView& cu, const char* op, const char* argument, int64_t rows) {
  require_tensor(cu, op, argument, DType::i32, {-1});
  const int32_t* at = cu.data<int32_t>();
  for (int64_t i = 0; i < cu.shape[0]; ++i)
    require(at[i] >= (i ? at[i - 1] : 0) && at[i] <= rows, op, argument,
            std::to_string(at[i]) + " at " + std::to_string(i) + ", expected a growing list in 0.." + std::to_string(rows));
}

void dense_attention(TensorView q, TensorView k, TensorView v, float scale, bool causal, int64_t window, float softcap, OptionalTensor cu_q,
                     OptionalTensor cu_k, TensorView out, TensorView lse) {
  constexpr const char* kOp = "attention.dense";
  const AttentionSizes n = require_attention(kOp, q, k, v, out, lse);
  require(cu_q.has_value() == cu_k.has_value(), kOp, "cu_q, cu_k", "expected both or none");
  int64_t seqs = n.batch;
  if (cu_q) {
    require(n.batch == 1, kOp, "cu_q", "expected one batch entry");
    require_offsets(*cu_q, kOp, "cu_q", n.q_len);
    require_offsets(*cu_k, kOp, "cu_k", n.k_len);
    require(cu_q->shape[0] == cu_k->shape[0] && cu_q->shape[0] > 0, kOp, "cu_k", "expected the length of cu_q, at least 1");
    seqs = cu_q->shape[0] - 1;
  }
  launch("dense_attention", dense_attention_cpu,
         DenseAttentionParams{.q = q.data(),
                              .k = k.data(),
                              .v = v.data(),
                              .out = out.data(),
                              .lse = lse.data<float>(),
                              .cu_q = data_or_null<int32_t>(cu_q),
                              .cu_k = data_or_null<int32_t>(cu_k),
                              .seqs = seqs,
                              .q_len = n.q_len,
                              .k_len = n.k_len,
                              .heads = n.heads,
                              .kv_heads = n.kv_heads,
                              .head_dim = n.head_dim,
                              .q_strides = row_strides(q),
                              .k_strides = row_strides(k),
                              .v_strides = row_strides(v),
                              .out_strides = row_strides(out),
                              .window = window,
                              .scale = scale,
                              .softcap = softcap,
                              .causal = causal,
                              .dtype = q.dtype});
}

}  // namespace

STRETTO_BIND(attention_dense) { m.def("dense_attention", &dense_attention); }

}  // namespace stretto
