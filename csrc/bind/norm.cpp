#include "bind/bind.h"
#include "kernels/norm/gather_rows.h"
#include "kernels/norm/rms_norm.h"

namespace stretto {

static void rms_norm(TensorView x, TensorView weight, float eps, OptionalTensor residual, TensorView out, OptionalTensor num_rows) {
  require(x.ndim == 2 && out.ndim == 2 && x.contiguous_from(1) && out.contiguous_from(1), "rms_norm", "x, out",
          "expected rows of contiguous elements");
  require(x.dtype == out.dtype && x.shape[0] == out.shape[0] && x.shape[1] == out.shape[1], "rms_norm", "out", "expected the shape and dtype of x");
  require_tensor(weight, "rms_norm", "weight", DType::f32, {x.shape[1]});
  require(!residual || (residual->ndim == 2 && residual->dtype == x.dtype && residual->contiguous_from(1) && residual->shape[0] == x.shape[0] &&
                        residual->shape[1] == x.shape[1]),
          "rms_norm", "residual", "expected the shape and dtype of x");
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
  m.def("gather_rows", &gather_rows);
}

}  // namespace stretto
