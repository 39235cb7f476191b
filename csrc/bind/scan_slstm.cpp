#include "bind/bind.h"
#include "bind/recurrent_rows.h"
#include "kernels/scan/slstm.h"

namespace stretto {
namespace {

void slstm(const std::string& name, TensorView Wx, TensorView R, TensorView b, TensorView state, TensorView out, OptionalTensor cu_seqlens,
           OptionalTensor slots, bool update) {
  const char* op = name.c_str();
  require(Wx.ndim == 4 && Wx.shape[1] == 4 && !Wx.cuda && Wx.contiguous_from(3), op, "Wx", "expected [tokens, 4, heads, dim] on a CPU");
  const int64_t tokens = Wx.shape[0], heads = Wx.shape[2], dim = Wx.shape[3];
  require_tensor(R, op, "R", R.dtype, {heads, dim, 4, dim});
  require_tensor(b, op, "b", DType::f32, {4, heads, dim});
  require_tensor(state, op, "state", DType::f32, {-1, 4, heads, dim});
  require_tensor(out, op, "out", Wx.dtype, {tokens, heads, dim});
  const int64_t num_slots = state.shape[0];
  require(!slots || slots->ndim == 1, op, "slot_ids", "expected one dimension");
  const int64_t batch = slots ? slots->shape[0] : num_slots;
  if (cu_seqlens) require_bounds(*cu_seqlens, op, batch, tokens);
  require(cu_seqlens || tokens == batch, op, "Wx", "expected one token a sequence, or cu_seqlens");
  if (slots) require_slots(*slots, op, num_slots, update);
  launch("slstm", slstm_cpu,
         SlstmParams{.Wx = Wx.data(),
                     .R = R.data(),
                     .b = b.data<float>(),
                     .state = state.data<float>(),
                     .out = out.data(),
                     .cu_seqlens = data_or_null<int32_t>(cu_seqlens),
                     .slots = data_or_null<int32_t>(slots),
                     .batch = batch,
                     .tokens = tokens,
                     .num_slots = num_slots,
                     .heads = heads,
                     .dim = dim,
                     .token_stride = Wx.strides[0],
                     .gate_stride = Wx.strides[1],
                     .head_stride = Wx.strides[2],
                     .update = update,
                     .dtype = Wx.dtype,
                     .weight_dtype = R.dtype});
}

}  // namespace

STRETTO_BIND(scan_slstm) { m.def("slstm", &slstm); }

}  // namespace stretto
