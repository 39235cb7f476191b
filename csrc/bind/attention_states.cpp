#include "bind/bind.h"
#include "kernels/attention/merge_states.h"

namespace stretto {

static void merge_states(TensorView a, TensorView lse_a, TensorView b, TensorView lse_b, TensorView out, TensorView lse_out) {
  constexpr const char* kOp = "attention.merge_states";
  require(a.ndim == 3, kOp, "a", "expected [tokens, heads, head_dim]");
  const int64_t tokens = a.shape[0], heads = a.shape[1], head_dim = a.shape[2];
  require_tensor(a, kOp, "a", a.dtype, {tokens, heads, head_dim});
  require_tensor(b, kOp, "b", a.dtype, {tokens, heads, head_dim});
  require_tensor(out, kOp, "out", a.dtype, {tokens, heads, head_dim});
  require_tensor(lse_a, kOp, "lse_a", DType::f32, {tokens, heads});
  require_tensor(lse_b, kOp, "lse_b", DType::f32, {tokens, heads});
  require_tensor(lse_out, kOp, "lse_out", DType::f32, {tokens, heads});
  launch("merge_states", merge_states_cpu,
         MergeStatesParams{.a = a.data(),
                           .b = b.data(),
                           .lse_a = lse_a.data<float>(),
                           .lse_b = lse_b.data<float>(),
                           .out = out.data(),
                           .lse_out = lse_out.data<float>(),
                           .rows = tokens * heads,
                           .head_dim = head_dim,
                           .dtype = a.dtype},
         a);
}

STRETTO_BIND(attention_states) { m.def("merge_states", &merge_states); }

}  // namespace stretto
