#include "bind/bind.h"
#include "kernels/dct/dct_separable.h"

namespace stretto {

static DctAxis axis_of(const TensorView& even, const TensorView& odd, const TensorView& x, const TensorView& out, int dim) {
  const int64_t in = x.shape[dim], to = out.shape[dim];
  require(even.ndim == 2, "dct", "even", "expected [ceil(in / 2), pitch]");
  const int64_t pitch = even.shape[1];
  require_tensor(even, "dct", "even", DType::f32, {(in + 1) / 2, pitch});
  require_tensor(odd, "dct", "odd", DType::f32, {in / 2, pitch});
  require(pitch % 4 == 0 && 2 * pitch >= to, "dct", "even", "pitch does not hold half of the outputs");
  return {.even = even.data<float>(),
          .odd = odd.data<float>(),
          .in = in,
          .out = to,
          .pitch = pitch,
          .x_stride = x.strides[dim],
          .out_stride = out.strides[dim]};
}

static void dct_separable(TensorView x, TensorView even_h, TensorView odd_h, TensorView even_w, TensorView odd_w, bool fold_in, bool fold_out,
                          TensorView out) {
  require(x.ndim == 4 && out.ndim == 4 && x.contiguous_from(3) && out.contiguous_from(3), "dct", "x, out",
          "expected [batch, h, w, channels] with contiguous channels");
  require(x.dtype == out.dtype && x.shape[0] == out.shape[0] && x.shape[3] == out.shape[3], "dct", "out", "expected dtype, batch and channels of x");
  DctAxis rows = axis_of(even_h, odd_h, x, out, 1), columns = axis_of(even_w, odd_w, x, out, 2);
  const bool columns_first = rows.in * columns.out * (columns.in + rows.out) <= columns.in * rows.out * (rows.in + columns.out);  // multiplications
  launch("dct_separable", dct_separable_cpu,
         DctSeparableParams{.x = x.data(),
                            .out = out.data(),
                            .outer = columns_first ? rows : columns,
                            .inner = columns_first ? columns : rows,
                            .batch = x.shape[0],
                            .channels = x.shape[3],
                            .x_batch_stride = x.strides[0],
                            .out_batch_stride = out.strides[0],
                            .fold_in = fold_in,
                            .fold_out = fold_out,
                            .dtype = x.dtype});
}

STRETTO_BIND(dct) { m.def("dct_separable", &dct_separable); }

}  // namespace stretto
