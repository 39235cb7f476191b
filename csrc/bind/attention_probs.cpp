#include "kernels/attention/attention_probs.h"

#include "bind/attention_rows.h"

namespace stretto {
namespace {

void attention_with_probs(TensorView q, TensorView k, TensorView v, float scale, bool causal, int64_t window, float softcap, TensorView out,
                          TensorView lse, TensorView probs) {
  constexpr const char* kOp = "attention.with_probs";
  AttentionWithProbsParams p{.t = attention_tensors(kOp, q, k, v, out, lse, scale, softcap),
                             .visible = {.causal = causal, .window = window},
                             .probs = probs.data(),
                             .probs_dtype = probs.dtype};
  require_tensor(probs, kOp, "probs", probs.dtype, {p.t.batch, p.t.heads, p.t.q_len, p.t.k_len});
  launch("attention_with_probs", attention_with_probs_cpu, p);
}

void apply_probs(TensorView probs, TensorView v, TensorView out) {
  constexpr const char* kOp = "attention.apply_probs";
  require(probs.ndim == 4 && probs.contiguous_from(3) && !probs.cuda, kOp, "probs", "expected [batch, heads, rows, keys] with adjacent keys on CPU");
  require_rows(v, kOp, "v", v.dtype);
  require_rows(out, kOp, "out", v.dtype);
  ApplyProbsParams p{};
  p.t.v = v.data(), p.t.out = out.data(), p.t.dtype = v.dtype;
  p.t.batch = probs.shape[0], p.t.heads = probs.shape[1], p.t.q_len = probs.shape[2], p.t.k_len = probs.shape[3];
  p.t.kv_heads = v.shape[2], p.t.head_dim = v.shape[3];
  p.t.v_strides = row_strides(v), p.t.out_strides = row_strides(out);
  require(v.shape[0] == p.t.batch && v.shape[1] == p.t.k_len && p.t.kv_heads > 0 && p.t.heads > 0 && p.t.heads % p.t.kv_heads == 0, kOp, "v",
          "does not match probs");
  require(out.shape[0] == p.t.batch && out.shape[1] == p.t.q_len && out.shape[2] == p.t.heads && out.shape[3] == p.t.head_dim, kOp, "out",
          "does not match probs and v");
  require(p.t.q_len < (int64_t(1) << 31) && p.t.k_len < (int64_t(1) << 31), kOp, "probs", "more than 2^31 rows or keys");
  p.probs = probs.data(), p.probs_dtype = probs.dtype;
  p.probs_batch = probs.strides[0], p.probs_head = probs.strides[1], p.probs_row = probs.strides[2];
  launch("apply_probs", apply_probs_cpu, p);
}

}  // namespace

STRETTO_BIND(attention_probs) {
  m.def("attention_with_probs", &attention_with_probs);
  m.def("apply_probs", &apply_probs);
}

}  // namespace stretto
