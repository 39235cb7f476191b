#include "bind/attention_rows.h"
#include "kernels/attention/attention_sums.h"
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

Sequences sequences_of(const char* op, const AttentionTensors& t, const OptionalTensor& cu_q, const OptionalTensor& cu_k) {
  require(cu_q.has_value() == cu_k.has_value(), op, "cu_q, cu_k", "expected both or none");
  if (!cu_q) return {nullptr, nullptr, t.batch};
  require(t.batch == 1, op, "cu_q", "expected one batch entry");
  require_offsets(*cu_q, op, "cu_q", t.q_len);
  require_offsets(*cu_k, op, "cu_k", t.k_len);
  require(cu_q->shape[0] == cu_k->shape[0] && cu_q->shape[0] > 0, op, "cu_k", "expected the length of cu_q, at least 1");
  return {cu_q->data<int32_t>(), cu_k->data<int32_t>(), cu_q->shape[0] - 1};
}

void dense_attention(TensorView q, TensorView k, TensorView v, float scale, bool causal, int64_t window, float softcap, OptionalTensor cu_q,
                     OptionalTensor cu_k, TensorView out, TensorView lse) {
  constexpr const char* kOp = "attention.dense";
  const AttentionTensors t = attention_tensors(kOp, q, k, v, out, lse, scale, softcap);
  launch("dense_attention", dense_attention_cpu,
         DenseAttentionParams{.t = t, .sequences = sequences_of(kOp, t, cu_q, cu_k), .visible = {.causal = causal, .window = window}});
}

void attention_sums(TensorView q, TensorView k, TensorView lse, float scale, bool causal, int64_t window, float softcap, OptionalTensor cu_q,
                    OptionalTensor cu_k, TensorView columns, OptionalTensor diagonals) {
  constexpr const char* kOp = "attention.sums";
  const AttentionTensors t = query_tensors(kOp, q, k, lse, scale, softcap);
  require_tensor(columns, kOp, "columns", DType::f32, {t.batch, t.heads, t.k_len});
  require(!diagonals || !cu_q, kOp, "diagonals", "expected without cu_q");
  if (diagonals) require_tensor(*diagonals, kOp, "diagonals", DType::f32, {t.batch, t.heads, t.q_len + t.k_len - 1});
  launch("attention_sums", attention_sums_cpu,
         AttentionSumsParams{.t = t,
                             .sequences = sequences_of(kOp, t, cu_q, cu_k),
                             .visible = {.causal = causal, .window = window},
                             .columns = columns.data<float>(),
                             .diagonals = data_or_null<float>(diagonals)});
}

}  // namespace

STRETTO_BIND(attention_dense) {
  m.def("dense_attention", &dense_attention);
  m.def("attention_sums", &attention_sums);
}

}  // namespace stretto
