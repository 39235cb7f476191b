#include "bind/bind.h"
#include "bind/recurrent_rows.h"
#include "kernels/scan/mlstm.h"

namespace stretto {
namespace {

// Strides of a tensor [tokens, heads, width] or [batch, heads, tokens, width]; gates have no width.
MlstmStrides strides_of(const TensorView& t, bool packed) {
  if (packed) return {0, t.strides[0], t.strides[1]};
  return {t.strides[0], t.strides[2], t.strides[1]};
}

// Sizes as they must agree: [tokens, heads] or [batch, heads, tokens], and the width where it is not negative.
void require_rows(const TensorView& t, const char* op, const char* argument, const TensorView& k, DType dtype, int64_t width) {
  const int lead = k.ndim - 1;
  bool same = t.ndim == lead + (width < 0 ? 0 : 1) && t.dtype == dtype && !t.cuda;
  for (int d = 0; same && d < lead; ++d) same = t.shape[d] == k.shape[d];
  require(same && (width < 0 || (t.shape[lead] == width && t.contiguous_from(lead))), op, argument, "expected the tokens and heads of k");
}

void require_counts(const TensorView& counts, const char* op, const int32_t* cu) {
  for (int64_t b = 0; b < counts.shape[0]; ++b) {
    const int32_t n = counts.data<int32_t>()[b], have = cu ? cu[b + 1] - cu[b] : 1;
    require(n >= 0 && n <= have, op, "counts", std::to_string(n) + " at " + std::to_string(b) + ", expected 0 to " + std::to_string(have));
  }
}

// All three ops are this kernel: whole sequences, steps with slots, and replay, which has no q, no out, and counts.
void mlstm(const std::string& name, OptionalTensor q, TensorView k, TensorView v, TensorView i, TensorView f, TensorView C, OptionalTensor n,
           OptionalTensor m, OptionalTensor out, OptionalTensor cu_seqlens, OptionalTensor slots, OptionalTensor counts, int64_t block, float scale,
           float eps, float cap, bool sigmoid, bool update) {
  const char* op = name.c_str();
  const bool packed = k.ndim == 3;
  require((packed || k.ndim == 4) && !k.cuda && k.contiguous_from(k.ndim - 1), op, "k", "expected [tokens, heads, dk] or [batch, heads, tokens, dk]");
  const int64_t heads = k.shape[1], dk = k.shape[k.ndim - 1], dv = v.shape[v.ndim - 1];
  require(dk > 0, op, "k", "width 0, expected at least 1");
  const int64_t tokens = packed ? k.shape[0] : k.shape[0] * k.shape[2];
  require_rows(v, op, "v", k, k.dtype, dv);
  if (q) require_rows(*q, op, "q", k, k.dtype, dk);
  if (out) require_rows(*out, op, "out", k, k.dtype, dv);
  require(q.has_value() == out.has_value(), op, "out", "expected with q only");
  require_rows(i, op, "i", k, i.dtype, -1);
  require_rows(f, op, "f", k, i.dtype, -1);
  require(C.ndim == 4, op, "C", "expected 4 dimensions");
  const int64_t num_slots = C.shape[0];
  require_tensor(C, op, "C", DType::f32, {num_slots, heads, dk, dv});
  require(sigmoid || (n && m), op, "n, m", "expected with exponential gates");
  if (n) require_tensor(*n, op, "n", DType::f32, {num_slots, heads, dk});
  if (m) require_tensor(*m, op, "m", DType::f32, {num_slots, heads});
  require(!slots || slots->ndim == 1, op, "slot_ids", "expected one dimension");
  const int64_t batch = slots ? slots->shape[0] : num_slots;
  if (cu_seqlens) require_bounds(*cu_seqlens, op, batch, tokens);
  const int64_t seq_len = batch ? tokens / batch : 0;
  require(cu_seqlens || (seq_len * batch == tokens && (packed || k.shape[0] == batch)), op, "k", "expected tokens for each sequence alike");
  if (slots) require_slots(*slots, op, num_slots, update);
  if (counts) {
    require_tensor(*counts, op, "counts", DType::i32, {batch});
    require_counts(*counts, op, data_or_null<int32_t>(cu_seqlens));
  }
  require(block >= 1, op, "chunk", std::to_string(block) + ", expected at least 1");
  const auto sequences = [&](const TensorView& t) {
    MlstmStrides s = strides_of(t, packed);
    if (packed) s.batch = seq_len * s.token;
    return s;
  };
  launch("mlstm", mlstm_cpu,
         MlstmParams{.q = data_or_null(q),
                     .k = k.data(),
                     .v = v.data(),
                     .i = i.data(),
                     .f = f.data(),
                     .out = data_or_null(out),
                     .C = C.data<float>(),
                     .n = data_or_null<float>(n),
                     .m = data_or_null<float>(m),
                     .cu_seqlens = data_or_null<int32_t>(cu_seqlens),
                     .counts = data_or_null<int32_t>(counts),
                     .slots = data_or_null<int32_t>(slots),
                     .batch = batch,
                     .tokens = tokens,
                     .seq_len = seq_len,
                     .num_slots = num_slots,
                     .heads = heads,
                     .dk = dk,
                     .dv = dv,
                     .q_strides = q ? sequences(*q) : MlstmStrides{},
                     .k_strides = sequences(k),
                     .v_strides = sequences(v),
                     .i_strides = sequences(i),
                     .f_strides = sequences(f),
                     .out_strides = out ? sequences(*out) : MlstmStrides{},
                     .block = block,
                     .scale = scale,
                     .eps = eps,
                     .cap = cap,
                     .sigmoid = sigmoid,
                     .update = update,
                     .dtype = k.dtype,
                     .gate_dtype = i.dtype});
}

}  // namespace

STRETTO_BIND(scan_mlstm) { m.def("mlstm", &mlstm); }

}  // namespace stretto
