#include "bind/bind.h"
#include "kernels/norm/add_rms_norm.h"
#include "kernels/norm/gather_rows.h"
#include "kernels/norm/layer_norm.h"
#include "kernels/norm/rms_norm.h"

namespace stretto {

static void require_rows(const TensorView& t, const char* op, const char* argument, const TensorView& like) {
  require(t.ndim == 2 && t.contiguous_from(1), op, argument, "expected rows of contiguous elements");
  require(t.dtype == like.dtype && t.shape[0] == like.shape[0] && t.shape[1] == like.shape[1], op, argument, "expected the shape and dtype of x");
}

static void require_rows(const OptionalTensor& t, const char* op, const char* argument, const TensorView& like) {
  if (t) require_rows(*t, op, argument, like);
}

static void require_count(const OptionalTensor& num_rows, const char* op) {
  if (num_rows) require_tensor(*num_rows, op, "num_rows", DType::i32, {1});
}

static void rms_norm(TensorView x, TensorView weight, float eps, OptionalTensor residual, TensorView out, OptionalTensor num_rows) {
  require_rows(x, "rms_norm", "x", x);
  require_tensor(weight, "rms_norm", "weight", DType::f32, {x.shape[1]});
  require_rows(residual, "rms_norm", "residual", x);
  require_rows(out, "rms_norm", "out", x);
  require_count(num_rows, "rms_norm");
  launch("rms_norm", rms_norm_cpu,
         RmsNormParams{.x = x.data(),
                       .weight = weight.data<float>(),
                       .residual = data_or_null(residual),
                       .out = out.data(),
                       .num_rows = data_or_null<int32_t>(num_rows),
                       .rows = x.shape[0],
                       .width = x.shape[1],
                       .x_stride = x.strides[0],
                       .residual_stride = residual ? residual->strides[0] : 0,
                       .out_stride = out.strides[0],
                       .eps = eps,
                       .dtype = x.dtype},
         x);
}

static void add_rms_norm(TensorView x, TensorView residual, TensorView weight, float eps, TensorView out, TensorView sum, OptionalTensor num_rows) {
  require_rows(x, "add_rms_norm", "x", x);
  require_rows(residual, "add_rms_norm", "residual", x);
  require_tensor(weight, "add_rms_norm", "weight", DType::f32, {x.shape[1]});
  require_rows(out, "add_rms_norm", "out", x);
  require_rows(sum, "add_rms_norm", "sum", x);
  require(x.numel() == 0 || out.ptr != sum.ptr, "add_rms_norm", "sum", "is out, expected memory of its own");
  require_count(num_rows, "add_rms_norm");
  launch("add_rms_norm", add_rms_norm_cpu,
         AddRmsNormParams{.x = x.data(),
                          .residual = residual.data(),
                          .weight = weight.data<float>(),
                          .out = out.data(),
                          .sum = sum.data(),
                          .num_rows = data_or_null<int32_t>(num_rows),
                          .rows = x.shape[0],
                          .width = x.shape[1],
                          .x_stride = x.strides[0],
                          .residual_stride = residual.strides[0],
                          .out_stride = out.strides[0],
                          .sum_stride = sum.strides[0],
                          .eps = eps,
                          .dtype = x.dtype});
}

static void layer_norm(TensorView x, TensorView weight, OptionalTensor bias, float eps, TensorView out, OptionalTensor num_rows) {
  require_rows(x, "layer_norm", "x", x);
  require_tensor(weight, "layer_norm", "weight", DType::f32, {x.shape[1]});
  if (bias) require_tensor(*bias, "layer_norm", "bias", DType::f32, {x.shape[1]});
  require_rows(out, "layer_norm", "out", x);
  require_count(num_rows, "layer_norm");
  launch("layer_norm", layer_norm_cpu,
         LayerNormParams{.x = x.data(),
                         .weight = weight.data<float>(),
                         .bias = data_or_null<float>(bias),
                         .out = out.data(),
                         .num_rows = data_or_null<int32_t>(num_rows),
                         .rows = x.shape[0],
                         .width = x.shape[1],
                         .x_stride = x.strides[0],
                         .out_stride = out.strides[0],
                         .eps = eps,
                         .dtype = x.dtype});
}

static void gather_rows(TensorView x, TensorView rows, TensorView out, OptionalTensor num_rows) {
  require(x.ndim == 2 && x.contiguous_from(1) && x.dtype == DType::f32, "norm.gather_rows", "x", "expected float32 rows of contiguous elements");
  require_tensor(rows, "norm.gather_rows", "rows", DType::i32, {-1});
  require(out.ndim == 2 && out.contiguous_from(1) && out.dtype == DType::f32 && out.shape[0] == rows.shape[0] && out.shape[1] == x.shape[1],
          "norm.gather_rows", "out", "expected float32 [rows, width] with contiguous rows");
  const GatherRowsParams p{.x = x.data<float>(),
                           .rows = rows.data<int32_t>(),
                           .out = out.data<float>(),
                           .num_rows = data_or_null<int32_t>(num_rows),
                           .num_x = x.shape[0],
                           .count = rows.shape[0],
                           .width = x.shape[1],
                           .x_stride = x.strides[0],
                           .out_stride = out.strides[0]};
  const int64_t used = x.cuda ? 0 : p.num_rows && *p.num_rows < p.count ? *p.num_rows : p.count;  // on CUDA a bad row becomes zeros
  for (int64_t i = 0; i < used; ++i)
    require(p.rows[i] >= 0 && p.rows[i] < p.num_x, "norm.gather_rows", "rows",
            std::to_string(p.rows[i]) + " at " + std::to_string(i) + ", expected 0.." + std::to_string(p.num_x - 1));
  launch("gather_rows", gather_rows_cpu, p, x);
}

STRETTO_BIND(norm) {
  m.def("rms_norm", &rms_norm);
  m.def("add_rms_norm", &add_rms_norm);
  m.def("layer_norm", &layer_norm);
  m.def("gather_rows", &gather_rows);
}

}  // namespace stretto
