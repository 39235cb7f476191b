#include "bind/bind.h"
#include "kernels/scan/causal_conv1d.h"
#include "kernels/scan/scan_backward.h"
#include "kernels/scan/selective_scan.h"
#include "kernels/scan/ssd.h"

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
  require_state(weight, op, "weight", {channels, -1});
  require(width >= 2 && width <= 8, op, "weight", std::to_string(width) + " taps, expected 2 to 8");
  require_vector(bias, op, "bias", DType::f32, channels);
  require_tensor(cu_seqlens, op, "cu_seqlens", DType::i32, {-1});
  if (initial) require_state(*initial, op, "initial", {batch, channels, width - 1});
  require_rows(y, op, "out", x.dtype, {tokens, channels});
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
                       .weight_strides = {weight.strides[0], weight.strides[1]},
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
  require_state(weight, op, "weight", {channels, -1});
  require(width >= 2 && width <= 8, op, "weight", std::to_string(width) + " taps, expected 2 to 8");
  require_vector(bias, op, "bias", DType::f32, channels);
  require_state(state, op, "state", {-1, channels, width - 1});
  require_vector(parent, op, "parent", DType::i32, tokens);
  require_rows(y, op, "out", x.dtype, {tokens, channels});
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
                           .weight_strides = {weight.strides[0], weight.strides[1]},
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

SelectiveScanInputs scan_inputs(const char* op, const TensorView& u, const TensorView& dt, const TensorView& a, const TensorView& b,
                                const OptionalTensor& c, const OptionalTensor& d, const OptionalTensor& z, const OptionalTensor& dt_bias,
                                bool softplus) {
  require_rows(u, op, "u", u.dtype, {-1, -1});
  const int64_t tokens = u.shape[0], channels = u.shape[1];
  require_rows(dt, op, "dt", u.dtype, {tokens, channels});
  require_state(a, op, "A", {channels, -1});
  require_rows(b, op, "B", u.dtype, {tokens, -1, a.shape[1]});
  require(b.shape[1] > 0 ? channels % b.shape[1] == 0 : channels == 0, op, "B", "groups, expected a divisor of the channels");
  if (c) require_rows(*c, op, "C", u.dtype, {tokens, b.shape[1], a.shape[1]});
  if (z) require_rows(*z, op, "z", u.dtype, {tokens, channels});
  require_vector(d, op, "D", DType::f32, channels);
  require_vector(dt_bias, op, "dt_bias", DType::f32, channels);
  return {.u = u.data(),
          .dt = dt.data(),
          .b = b.data(),
          .c = data_or_null(c),
          .z = data_or_null(z),
          .a = a.data<float>(),
          .d = data_or_null<float>(d),
          .dt_bias = data_or_null<float>(dt_bias),
          .tokens = tokens,
          .channels = channels,
          .states = a.shape[1],
          .groups = b.shape[1],
          .u_stride = u.strides[0],
          .dt_stride = dt.strides[0],
          .b_stride = b.strides[0],
          .c_stride = c ? c->strides[0] : 0,
          .z_stride = z ? z->strides[0] : 0,
          .a_strides = {a.strides[0], a.strides[1]},
          .softplus = softplus,
          .dtype = u.dtype};
}

void selective_scan(TensorView u, TensorView dt, TensorView a, TensorView b, TensorView c, OptionalTensor d, OptionalTensor z, OptionalTensor dt_bias,
                    bool softplus, OptionalTensor h0, TensorView cu_seqlens, TensorView y, TensorView h_last) {
  const char* op = "selective_scan";
  SelectiveScanParams p{.in = scan_inputs(op, u, dt, a, b, c, d, z, dt_bias, softplus),
                        .h0 = data_or_null<float>(h0),
                        .cu_seqlens = cu_seqlens.data<int32_t>(),
                        .y = y.data(),
                        .h_last = h_last.data<float>(),
                        .batch = cu_seqlens.shape[0] - 1,
                        .y_stride = y.strides[0],
                        .h0_strides = {}};
  require_tensor(cu_seqlens, op, "cu_seqlens", DType::i32, {-1});
  require_rows(y, op, "out", u.dtype, {p.in.tokens, p.in.channels});
  require_tensor(h_last, op, "h_last", DType::f32, {p.batch, p.in.channels, p.in.states});
  if (h0) require_state(*h0, op, "h0", {p.batch, p.in.channels, p.in.states});
  for (int i = 0; i < 3; ++i) p.h0_strides[i] = h0 ? h0->strides[i] : 0;
  launch(op, selective_scan_cpu, p);
}

void selective_scan_step(TensorView state, TensorView u, TensorView dt, TensorView a, TensorView b, TensorView c, OptionalTensor d, OptionalTensor z,
                         OptionalTensor dt_bias, bool softplus, OptionalTensor slots, OptionalTensor cu_seqlens, OptionalTensor parent, bool update,
                         TensorView y) {
  const char* op = "selective_scan_step";
  const SelectiveScanStepParams p{.in = scan_inputs(op, u, dt, a, b, c, d, z, dt_bias, softplus),
                                  .state = state.data<float>(),
                                  .slots = data_or_null<int32_t>(slots),
                                  .cu_seqlens = data_or_null<int32_t>(cu_seqlens),
                                  .parent = data_or_null<int32_t>(parent),
                                  .y = y.data(),
                                  .batch = batch_of(slots, cu_seqlens, u.shape[0], op),
                                  .num_slots = state.shape[0],
                                  .y_stride = y.strides[0],
                                  .state_strides = {state.strides[0], state.strides[1], state.strides[2]},
                                  .update = update && !parent};
  require_state(state, op, "state", {-1, p.in.channels, p.in.states});
  require_vector(parent, op, "parent", DType::i32, p.in.tokens);
  require_rows(y, op, "out", u.dtype, {p.in.tokens, p.in.channels});
  launch(op, selective_scan_step_cpu, p);
}

void selective_scan_replay(TensorView state, TensorView u, TensorView dt, TensorView a, TensorView b, TensorView rows, TensorView n,
                           OptionalTensor dt_bias, bool softplus, OptionalTensor slots) {
  const char* op = "selective_scan_replay";
  const SelectiveScanReplayParams p{.in = scan_inputs(op, u, dt, a, b, {}, {}, {}, dt_bias, softplus),
                                    .state = state.data<float>(),
                                    .rows = rows.data<int32_t>(),
                                    .n = n.data<int32_t>(),
                                    .slots = data_or_null<int32_t>(slots),
                                    .batch = rows.shape[0],
                                    .max_rows = rows.shape[1],
                                    .num_slots = state.shape[0],
                                    .state_strides = {state.strides[0], state.strides[1], state.strides[2]}};
  require_state(state, op, "state", {-1, p.in.channels, p.in.states});
  require_tensor(rows, op, "rows", DType::i32, {-1, -1});
  require_tensor(n, op, "n", DType::i32, {p.batch});
  require_vector(slots, op, "slots", DType::i32, p.batch);
  launch(op, selective_scan_replay_cpu, p);
}

SsdInputs ssd_inputs(const char* op, const TensorView& x, const TensorView& dt, const TensorView& a, const TensorView& b, const OptionalTensor& c,
                     const OptionalTensor& d, const OptionalTensor& z, const OptionalTensor& dt_bias, bool softplus) {
  require_rows(x, op, "x", x.dtype, {-1, -1, -1});
  const int64_t tokens = x.shape[0], heads = x.shape[1];
  require_rows(dt, op, "dt", x.dtype, {tokens, heads});
  require_tensor(a, op, "A", DType::f32, {heads});
  require_rows(b, op, "B", x.dtype, {tokens, -1, -1});
  require(b.shape[1] > 0 && heads % b.shape[1] == 0, op, "B", "groups, expected a divisor of the heads");
  if (c) require_rows(*c, op, "C", x.dtype, {tokens, b.shape[1], b.shape[2]});
  if (z) require_rows(*z, op, "z", x.dtype, {tokens, heads, x.shape[2]});
  require_vector(d, op, "D", DType::f32, heads);
  require_vector(dt_bias, op, "dt_bias", DType::f32, heads);
  return {.x = x.data(),
          .dt = dt.data(),
          .b = b.data(),
          .c = data_or_null(c),
          .z = data_or_null(z),
          .a = a.data<float>(),
          .d = data_or_null<float>(d),
          .dt_bias = data_or_null<float>(dt_bias),
          .tokens = tokens,
          .heads = heads,
          .dim = x.shape[2],
          .states = b.shape[2],
          .groups = b.shape[1],
          .x_stride = x.strides[0],
          .dt_stride = dt.strides[0],
          .b_stride = b.strides[0],
          .c_stride = c ? c->strides[0] : 0,
          .z_stride = z ? z->strides[0] : 0,
          .softplus = softplus,
          .dtype = x.dtype};
}

void ssd(TensorView x, TensorView dt, TensorView a, TensorView b, TensorView c, OptionalTensor d, OptionalTensor z, OptionalTensor dt_bias,
         bool softplus, OptionalTensor h0, TensorView cu_seqlens, int64_t chunk, TensorView y, TensorView h_last) {
  const char* op = "ssd";
  require_tensor(cu_seqlens, op, "cu_seqlens", DType::i32, {-1});
  require(chunk > 0, op, "chunk", "0 or less, expected at least 1");
  SsdParams p{.in = ssd_inputs(op, x, dt, a, b, c, d, z, dt_bias, softplus),
              .h0 = data_or_null<float>(h0),
              .cu_seqlens = cu_seqlens.data<int32_t>(),
              .y = y.data(),
              .h_last = h_last.data<float>(),
              .batch = cu_seqlens.shape[0] - 1,
              .chunk = chunk,
              .h0_strides = {}};
  require_tensor(y, op, "y", x.dtype, {p.in.tokens, p.in.heads, p.in.dim});
  require_tensor(h_last, op, "h_last", DType::f32, {p.batch, p.in.heads, p.in.dim, p.in.states});
  if (h0) require_state(*h0, op, "h0", {p.batch, p.in.heads, p.in.dim, p.in.states});
  for (int i = 0; i < 4; ++i) p.h0_strides[i] = h0 ? h0->strides[i] : 0;
  launch(op, ssd_cpu, p);
}

void ssd_step(TensorView state, TensorView x, TensorView dt, TensorView a, TensorView b, TensorView c, OptionalTensor d, OptionalTensor z,
              OptionalTensor dt_bias, bool softplus, OptionalTensor slots, OptionalTensor cu_seqlens, OptionalTensor parent, bool update,
              TensorView y) {
  const char* op = "ssd_step";
  const SsdStepParams p{.in = ssd_inputs(op, x, dt, a, b, c, d, z, dt_bias, softplus),
                        .state = state.data<float>(),
                        .slots = data_or_null<int32_t>(slots),
                        .cu_seqlens = data_or_null<int32_t>(cu_seqlens),
                        .parent = data_or_null<int32_t>(parent),
                        .y = y.data(),
                        .batch = batch_of(slots, cu_seqlens, x.shape[0], op),
                        .num_slots = state.shape[0],
                        .state_strides = {state.strides[0], state.strides[1], state.strides[2], state.strides[3]},
                        .update = update && !parent};
  require_state(state, op, "state", {-1, p.in.heads, p.in.dim, p.in.states});
  require_vector(parent, op, "parent", DType::i32, p.in.tokens);
  require_tensor(y, op, "out", x.dtype, {p.in.tokens, p.in.heads, p.in.dim});
  launch(op, ssd_step_cpu, p);
}

void ssd_replay(TensorView state, TensorView x, TensorView dt, TensorView a, TensorView b, TensorView rows, TensorView n, OptionalTensor dt_bias,
                bool softplus, OptionalTensor slots) {
  const char* op = "ssd_replay";
  const SsdReplayParams p{.in = ssd_inputs(op, x, dt, a, b, {}, {}, {}, dt_bias, softplus),
                          .state = state.data<float>(),
                          .rows = rows.data<int32_t>(),
                          .n = n.data<int32_t>(),
                          .slots = data_or_null<int32_t>(slots),
                          .batch = rows.shape[0],
                          .max_rows = rows.shape[1],
                          .num_slots = state.shape[0],
                          .state_strides = {state.strides[0], state.strides[1], state.strides[2], state.strides[3]}};
  require_state(state, op, "state", {-1, p.in.heads, p.in.dim, p.in.states});
  require_tensor(rows, op, "rows", DType::i32, {-1, -1});
  require_tensor(n, op, "n", DType::i32, {p.batch});
  require_vector(slots, op, "slots", DType::i32, p.batch);
  launch(op, ssd_replay_cpu, p);
}

void causal_conv1d_backward(TensorView dy, TensorView dfinal, TensorView x, TensorView weight, OptionalTensor bias, bool silu, OptionalTensor initial,
                            TensorView cu_seqlens, TensorView dx, TensorView dweight, TensorView dbias, TensorView dinitial) {
  const char* op = "causal_conv1d_backward";
  const int64_t tokens = x.shape[0], channels = x.shape[1], width = weight.shape[1], batch = cu_seqlens.shape[0] - 1;
  require_rows(x, op, "x", x.dtype, {-1, -1});
  require_rows(dy, op, "dy", x.dtype, {tokens, channels});
  require_state(weight, op, "weight", {channels, -1});
  require(width >= 2 && width <= 8, op, "weight", std::to_string(width) + " taps, expected 2 to 8");
  require_vector(bias, op, "bias", DType::f32, channels);
  require_tensor(cu_seqlens, op, "cu_seqlens", DType::i32, {-1});
  if (initial) require_state(*initial, op, "initial", {batch, channels, width - 1});
  require_tensor(dfinal, op, "dfinal", DType::f32, {batch, channels, width - 1});
  require_tensor(dx, op, "dx", x.dtype, {tokens, channels});
  require_tensor(dweight, op, "dweight", DType::f32, {channels, width});
  require_tensor(dbias, op, "dbias", DType::f32, {channels});
  require_tensor(dinitial, op, "dinitial", DType::f32, {batch, channels, width - 1});
  CausalConv1dBackwardParams p{.in = {.x = x.data(),
                                      .weight = weight.data<float>(),
                                      .bias = data_or_null<float>(bias),
                                      .initial = data_or_null<float>(initial),
                                      .cu_seqlens = cu_seqlens.data<int32_t>(),
                                      .y = nullptr,
                                      .final = nullptr,
                                      .tokens = tokens,
                                      .channels = channels,
                                      .width = width,
                                      .batch = batch,
                                      .x_stride = x.strides[0],
                                      .y_stride = 0,
                                      .weight_strides = {weight.strides[0], weight.strides[1]},
                                      .initial_strides = {},
                                      .silu = silu,
                                      .dtype = x.dtype},
                               .dy = dy.data(),
                               .dfinal = dfinal.data<float>(),
                               .dx = dx.data(),
                               .dweight = dweight.data<float>(),
                               .dbias = dbias.data<float>(),
                               .dinitial = dinitial.data<float>(),
                               .dy_stride = dy.strides[0]};
  for (int i = 0; i < 3; ++i) p.in.initial_strides[i] = initial ? initial->strides[i] : 0;
  launch(op, causal_conv1d_backward_cpu, p);
}

void selective_scan_backward(TensorView dy, TensorView dlast, TensorView u, TensorView dt, TensorView a, TensorView b, TensorView c, OptionalTensor d,
                             OptionalTensor z, OptionalTensor dt_bias, bool softplus, OptionalTensor h0, TensorView cu_seqlens, TensorView du,
                             TensorView ddt, TensorView da, TensorView db, TensorView dc, TensorView dd, OptionalTensor dz, TensorView dbias,
                             TensorView dh0) {
  const char* op = "selective_scan_backward";
  SelectiveScanBackwardParams p{.in = scan_inputs(op, u, dt, a, b, c, d, z, dt_bias, softplus),
                                .h0 = data_or_null<float>(h0),
                                .cu_seqlens = cu_seqlens.data<int32_t>(),
                                .dy = dy.data(),
                                .dlast = dlast.data<float>(),
                                .du = du.data(),
                                .ddt = ddt.data(),
                                .dz = data_or_null(dz),
                                .da = da.data<float>(),
                                .dd = dd.data<float>(),
                                .dbias = dbias.data<float>(),
                                .db = db.data<float>(),
                                .dc = dc.data<float>(),
                                .dh0 = dh0.data<float>(),
                                .batch = cu_seqlens.shape[0] - 1,
                                .dy_stride = dy.strides[0],
                                .h0_strides = {}};
  const int64_t tokens = p.in.tokens, channels = p.in.channels, states = p.in.states;
  const int64_t parts = scan_parts(channels, p.in.groups);
  require_tensor(cu_seqlens, op, "cu_seqlens", DType::i32, {-1});
  require_rows(dy, op, "dy", u.dtype, {tokens, channels});
  require_tensor(dlast, op, "dlast", DType::f32, {p.batch, channels, states});
  require_tensor(du, op, "du", u.dtype, {tokens, channels});
  require_tensor(ddt, op, "ddt", u.dtype, {tokens, channels});
  require(dz.has_value() == z.has_value(), op, "dz", "expected with z, and only then");
  if (dz) require_tensor(*dz, op, "dz", u.dtype, {tokens, channels});
  require_tensor(da, op, "da", DType::f32, {channels, states});
  require_tensor(dd, op, "dd", DType::f32, {channels});
  require_tensor(dbias, op, "dbias", DType::f32, {channels});
  require_tensor(db, op, "db", DType::f32, {parts, tokens, p.in.groups, states});
  require_tensor(dc, op, "dc", DType::f32, {parts, tokens, p.in.groups, states});
  require_tensor(dh0, op, "dh0", DType::f32, {p.batch, channels, states});
  if (h0) require_state(*h0, op, "h0", {p.batch, channels, states});
  for (int i = 0; i < 3; ++i) p.h0_strides[i] = h0 ? h0->strides[i] : 0;
  launch(op, selective_scan_backward_cpu, p);
}

}  // namespace

STRETTO_BIND(scan_mamba) {
  m.def("causal_conv1d", &causal_conv1d);
  m.def("causal_conv1d_step", &causal_conv1d_step);
  m.def("causal_conv1d_replay", &causal_conv1d_replay);
  m.def("selective_scan", &selective_scan);
  m.def("selective_scan_step", &selective_scan_step);
  m.def("selective_scan_replay", &selective_scan_replay);
  m.def("causal_conv1d_backward", &causal_conv1d_backward);
  m.def("selective_scan_backward", &selective_scan_backward);
  m.def("scan_parts", [](int64_t channels, int64_t groups) { return scan_parts(channels, groups); });
  m.def("ssd", &ssd);
  m.def("ssd_step", &ssd_step);
  m.def("ssd_replay", &ssd_replay);
}

}  // namespace stretto
