#include "bind/bind.h"
#include "kernels/sampling/argmax.h"
#include "kernels/sampling/draw.h"
#include "kernels/sampling/noise.h"
#include "kernels/sampling/penalize.h"
#include "kernels/sampling/warp.h"

namespace stretto {
namespace {

void require_rows(const TensorView& t, const char* op, const char* argument) {
  require(t.ndim == 2 && t.dtype == DType::f32 && t.contiguous_from(1), op, argument, "expected float32 rows of contiguous elements");
}
void require_vector(const OptionalTensor& t, const char* op, const char* argument, DType dtype, int64_t size) {
  if (t) require_tensor(*t, op, argument, dtype, {size});
}
Purpose purpose_of(const char* op, int purpose) {
  require(purpose >= 0 && purpose <= 2, op, "purpose", std::to_string(purpose) + ", expected 0 (token), 1 (accept) or 2 (draft)");
  return static_cast<Purpose>(purpose);
}

void argmax(TensorView logits, TensorView out, OptionalTensor status, OptionalTensor num_rows) {
  constexpr const char* op = "sampling.argmax";
  require_rows(logits, op, "logits");
  require(logits.shape[1] > 0, op, "logits", "no columns, expected at least one token");
  require_tensor(out, op, "out", DType::i32, {logits.shape[0]});
  require_vector(status, op, "status", DType::i32, logits.shape[0]);
  require_vector(num_rows, op, "num_rows", DType::i32, 1);
  launch("argmax", argmax_cpu,
         ArgmaxParams{.logits = logits.data<float>(),
                      .out = out.data<int32_t>(),
                      .status = data_or_null<int32_t>(status),
                      .num_rows = data_or_null<int32_t>(num_rows),
                      .rows = logits.shape[0],
                      .width = logits.shape[1],
                      .stride = logits.strides[0]},
         logits);
}

void warp(TensorView logits, TensorView temperature, TensorView top_k, TensorView top_p, TensorView min_p, TensorView out, OptionalTensor status,
          OptionalTensor num_rows) {
  constexpr const char* op = "sampling.warp";
  const int64_t rows = logits.shape[0], width = logits.shape[1];
  require_rows(logits, op, "logits");
  require_rows(out, op, "out");
  require(width > 0 && width < (int64_t(1) << 30), op, "logits", std::to_string(width) + " columns, expected 1 to 2^30 - 1");
  require(out.shape[0] == rows && out.shape[1] == width, op, "out", "expected the shape of logits");
  require_tensor(temperature, op, "temperature", DType::f32, {rows});
  require_tensor(top_k, op, "top_k", DType::i32, {rows});
  require_tensor(top_p, op, "top_p", DType::f32, {rows});
  require_tensor(min_p, op, "min_p", DType::f32, {rows});
  require_vector(status, op, "status", DType::i32, rows);
  require_vector(num_rows, op, "num_rows", DType::i32, 1);
  launch("warp", warp_cpu,
         WarpParams{.logits = logits.data<float>(),
                    .temperature = temperature.data<float>(),
                    .top_k = top_k.data<int32_t>(),
                    .top_p = top_p.data<float>(),
                    .min_p = min_p.data<float>(),
                    .out = out.data<float>(),
                    .status = data_or_null<int32_t>(status),
                    .num_rows = data_or_null<int32_t>(num_rows),
                    .rows = rows,
                    .width = width,
                    .logits_stride = logits.strides[0],
                    .out_stride = out.strides[0]},
         logits);
}

void draw(TensorView p, TensorView seed, TensorView lineage, TensorView pos, int purpose, bool gumbel, TensorView out, OptionalTensor num_rows) {
  constexpr const char* op = "sampling.draw";
  const int64_t rows = p.shape[0];
  require_rows(p, op, "p");
  require(p.shape[1] < (int64_t(1) << 30), op, "p", std::to_string(p.shape[1]) + " columns, expected at most 2^30 - 1");
  require_tensor(seed, op, "seed", DType::i64, {rows});
  require_tensor(lineage, op, "lineage", DType::i64, {rows});
  require_tensor(pos, op, "pos", DType::i32, {rows});
  require_tensor(out, op, "out", DType::i32, {rows});
  require_vector(num_rows, op, "num_rows", DType::i32, 1);
  launch("draw", draw_cpu,
         DrawParams{.p = p.data<float>(),
                    .seed = seed.data<int64_t>(),
                    .lineage = lineage.data<int64_t>(),
                    .pos = pos.data<int32_t>(),
                    .out = out.data<int32_t>(),
                    .num_rows = data_or_null<int32_t>(num_rows),
                    .rows = rows,
                    .width = p.shape[1],
                    .stride = p.strides[0],
                    .purpose = purpose_of(op, purpose),
                    .gumbel = gumbel},
         p);
}

// width 0: out [rows] are uniforms; otherwise out [rows, width] is Gumbel noise.
void noise(TensorView seed, TensorView lineage, TensorView pos, int purpose, uint32_t index, TensorView out) {
  constexpr const char* op = "sampling.uniform, sampling.gumbel";
  const int64_t rows = seed.ndim == 1 ? seed.shape[0] : -1, width = out.ndim == 2 ? out.shape[1] : 0;
  require_tensor(seed, op, "seed", DType::i64, {rows});
  require_tensor(lineage, op, "lineage", DType::i64, {rows});
  require_tensor(pos, op, "pos", DType::i32, {rows});
  if (out.ndim == 2) require_tensor(out, op, "out", DType::f64, {rows, width});
  else require_tensor(out, op, "out", DType::f64, {rows});
  require(index <= kMaxNoiseIndex && width < (int64_t(1) << 30), op, "index", "expected less than 2^28, tokens less than 2^30");
  if (out.ndim == 2 && width == 0) return;
  launch("noise", noise_cpu,
         NoiseParams{.seed = seed.data<int64_t>(),
                     .lineage = lineage.data<int64_t>(),
                     .pos = pos.data<int32_t>(),
                     .out = out.data<double>(),
                     .rows = rows,
                     .width = width,
                     .purpose = purpose_of(op, purpose),
                     .index = index},
         seed);
}

void penalize(TensorView logits, TensorView history, OptionalTensor cu_history, TensorView repetition, TensorView presence, TensorView frequency,
              OptionalTensor bias_ids, OptionalTensor bias_values, OptionalTensor cu_bias, OptionalTensor num_rows) {
  constexpr const char* op = "sampling.penalize";
  const int64_t rows = logits.shape[0];
  require_rows(logits, op, "logits");
  if (cu_history) require_tensor(history, op, "history", DType::i32, {-1});
  else require_tensor(history, op, "history", DType::i32, {rows, -1});
  require_vector(cu_history, op, "cu_history", DType::i32, rows + 1);
  for (const auto& [name, t] : {std::pair{"repetition", &repetition}, {"presence", &presence}, {"frequency", &frequency}})
    require_tensor(*t, op, name, DType::f32, {rows});
  require(bias_ids.has_value() == bias_values.has_value() && bias_ids.has_value() == cu_bias.has_value(), op, "bias_ids, bias_values, cu_bias",
          "expected all three or none");
  require_vector(bias_ids, op, "bias_ids", DType::i32, -1);
  if (bias_ids) require_vector(bias_values, op, "bias_values", DType::f32, bias_ids->shape[0]);
  require_vector(cu_bias, op, "cu_bias", DType::i32, rows + 1);
  require_vector(num_rows, op, "num_rows", DType::i32, 1);
  launch("penalize", penalize_cpu,
         PenalizeParams{.logits = logits.data<float>(),
                        .history = history.data<int32_t>(),
                        .cu_history = data_or_null<int32_t>(cu_history),
                        .repetition = repetition.data<float>(),
                        .presence = presence.data<float>(),
                        .frequency = frequency.data<float>(),
                        .bias_ids = data_or_null<int32_t>(bias_ids),
                        .cu_bias = data_or_null<int32_t>(cu_bias),
                        .bias_values = data_or_null<float>(bias_values),
                        .num_rows = data_or_null<int32_t>(num_rows),
                        .rows = rows,
                        .width = logits.shape[1],
                        .stride = logits.strides[0],
                        .history_width = cu_history ? 0 : history.shape[1],
                        .total_history = history.numel(),
                        .total_bias = bias_ids ? bias_ids->shape[0] : 0},
         logits);
}

}  // namespace

STRETTO_BIND(sampling) {
  m.def("argmax", &argmax);
  m.def("warp", &warp);
  m.def("draw", &draw);
  m.def("noise", &noise);
  m.def("penalize", &penalize);
}

}  // namespace stretto
