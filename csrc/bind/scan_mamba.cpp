#include "bind/bind.h"
#include "kernels/scan/causal_conv1d.h"

namespace stretto {
namespace {

// [rows, ...] of one floating type whose dimensions after the first are dense.
void require_rows(const TensorView& t, const char* op, const char* argument, DType dtype, std::initializer_list<int64_t> shape) {
  bool same = t.ndim == static_cast<int>(shape.size()) && t.dtype == dtype && t.contiguous_from(1) && !t.cuda;
  int i = 0;
  for (int64_t want : shape) {
    same = same && (want < 0 || t.shape[i] == want);
    ++i;
  }
  require(same, op, argument, "expected dense rows of the sizes and dtype that the other arguments name");
}

// A float32 state of any strides.
void require_state(const TensorView& t, const char* op, const char* argument, std::initializer_list<int64_t> shape) {
  bool same = t.ndim == static_cast<int>(shape.size()) && t.dtype == DType::f32 && !t.cuda;
  int i = 0;
  for (int64_t want : shape) {
    same = same && (want < 0 || t.shape[i] == want);
    ++i;
  }
  require(same, op, argument, "expected float32 of the sizes that the other arguments name");
}

void require_vector(const OptionalTensor& t, const char* op, const char* argument, DType dtype, int64_t size) {
  if (t) require_tensor(*t, op, argument, dtype, {size});
}

int64_t batch_of(const OptionalTensor& slots, const OptionalTensor& cu_seqlens, int64_t tokens, const char* op) {
  const int64_t batch = cu_seqlens ? cu_seqlens->shape[0] - 1 : tokens;
  if (cu_seqlens) require_tensor(*cu_seqlens, op, "cu_seqlens", DType::i32, {-1});
  require(batch >= 0, op, "cu_seqlens", "no elements, expected batch + 1");
  require_vector(slots, op, "slots", DType::i32, batch);
  return batch;
}

void causal_conv1d(TensorView x, TensorView weight, OptionalTensor bias, bool silu, OptionalTensor initial, TensorView cu_seqlens, TensorView y,
                   TensorView final) {
  const char* op = "causal_conv1d";
  const int64_t tokens = x.shape[0], channels = x.shape[1], width = weight.shape[1], batch = cu_seqlens.shape[0] - 1;
  require_rows(x, op, "x", x.dtype, {-1, -1});
  require_tensor(weight, op, "weight", DType::f32, {channels, -1});
  require(width >= 2 && width <= 8, op, "weight", std::to_string(width) + " taps, expected 2 to 8");
  require_vector(bias, op, "bias", DType::f32, channels);
  require_tensor(cu_seqlens, op, "cu_seqlens", DType::i32, {-1});
  if (initial) require_state(*initial, op, "initial", {batch, channels, width - 1});
  require_rows(y, op, "y", x.dtype, {tokens, channels});
  require_tensor(final, op, "final", DType::f32, {batch, channels, width - 1});
  CausalConv1dParams p{.x = x.data(),
                       .weight = weight.data<float>(),
                       .bias = data_or_null<float>(bias),
                       .initial = data_or_null<float>(initial),
                       .cu_seqlens = cu_seqlens.data<int32_t>(),
                       .y = y.data(),
                       .final = final.data<float>(),
                       .tokens = tokens,
                       .channels = channels,
                       .width = width,
                       .batch = batch,
                       .x_stride = x.strides[0],
                       .y_stride = y.strides[0],
                       .initial_strides = {},
                       .silu = silu,
                       .dtype = x.dtype};
  for (int i = 0; i < 3; ++i) p.initial_strides[i] = initial ? initial->strides[i] : 0;
  launch(op, causal_conv1d_cpu, p);
}

void causal_conv1d_step(TensorView x, TensorView state, TensorView weight, OptionalTensor bias, bool silu, OptionalTensor slots,
                        OptionalTensor cu_seqlens, OptionalTensor parent, bool update, TensorView y) {
  const char* op = "causal_conv1d_step";
  const int64_t tokens = x.shape[0], channels = x.shape[1], width = weight.shape[1];
  require_rows(x, op, "x", x.dtype, {-1, -1});
  require_tensor(weight, op, "weight", DType::f32, {channels, -1});
  require(width >= 2 && width <= 8, op, "weight", std::to_string(width) + " taps, expected 2 to 8");
  require_vector(bias, op, "bias", DType::f32, channels);
  require_state(state, op, "state", {-1, channels, width - 1});
  require_vector(parent, op, "parent", DType::i32, tokens);
  require_rows(y, op, "y", x.dtype, {tokens, channels});
  CausalConv1dStepParams p{.x = x.data(),
                           .state = state.data<float>(),
                           .weight = weight.data<float>(),
                           .bias = data_or_null<float>(bias),
                           .slots = data_or_null<int32_t>(slots),
                           .cu_seqlens = data_or_null<int32_t>(cu_seqlens),
                           .parent = data_or_null<int32_t>(parent),
                           .y = y.data(),
                           .tokens = tokens,
                           .channels = channels,
                           .width = width,
                           .batch = batch_of(slots, cu_seqlens, tokens, op),
                           .num_slots = state.shape[0],
                           .x_stride = x.strides[0],
                           .y_stride = y.strides[0],
                           .state_strides = {state.strides[0], state.strides[1], state.strides[2]},
                           .silu = silu,
                           .update = update && !parent,
                           .dtype = x.dtype};
  launch(op, causal_conv1d_step_cpu, p);
}

void causal_conv1d_replay(TensorView state, TensorView x, TensorView rows, TensorView n, OptionalTensor slots) {
  const char* op = "causal_conv1d_replay";
  require_rows(x, op, "x", x.dtype, {-1, -1});
  require_state(state, op, "state", {-1, x.shape[1], -1});
  require(state.shape[2] >= 1 && state.shape[2] <= 7, op, "state", std::to_string(state.shape[2]) + " inputs, expected 1 to 7");
  require_tensor(rows, op, "rows", DType::i32, {-1, -1});
  require_tensor(n, op, "n", DType::i32, {rows.shape[0]});
  require_vector(slots, op, "slots", DType::i32, rows.shape[0]);
  const CausalConv1dReplayParams p{.state = state.data<float>(),
                                   .x = x.data(),
                                   .rows = rows.data<int32_t>(),
                                   .n = n.data<int32_t>(),
                                   .slots = data_or_null<int32_t>(slots),
                                   .inputs = x.shape[0],
                                   .channels = x.shape[1],
                                   .width = state.shape[2] + 1,
                                   .batch = rows.shape[0],
                                   .max_rows = rows.shape[1],
                                   .num_slots = state.shape[0],
                                   .x_stride = x.strides[0],
                                   .state_strides = {state.strides[0], state.strides[1], state.strides[2]},
                                   .dtype = x.dtype};
  launch(op, causal_conv1d_replay_cpu, p);
}

}  // namespace

STRETTO_BIND(scan_mamba) {
  m.def("causal_conv1d", &causal_conv1d);
  m.def("causal_conv1d_step", &causal_conv1d_step);
  m.def("causal_conv1d_replay", &causal_conv1d_replay);
}

}  // namespace stretto
