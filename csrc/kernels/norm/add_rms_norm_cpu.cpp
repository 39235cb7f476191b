#include "kernels/norm/add_rms_norm.h"

#include "common/parallel.h"
#include "kernels/norm/norm_row.h"

namespace stretto::STRETTO_ISA {

template <class T> static void add_row(const T* x, const T* residual, int64_t width, T* sum) {
  const int64_t whole = width / kLanes * kLanes;
  const int tail = static_cast<int>(width - whole);
  for (int64_t i = 0; i < whole; i += kLanes) store(sum + i, add(load(x + i), load(residual + i)));
  if (tail) store_some(sum + whole, add(load_some(x + whole, tail), load_some(residual + whole, tail)), tail);
}

void add_rms_norm(const AddRmsNormParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const int64_t grain = 8192 / (p.width + 1) + 1;  // about 64 KB of floats in and 64 KB out
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, rows, grain, [&](int64_t row) {
      T* sum = static_cast<T*>(p.sum) + row * p.sum_stride;
      add_row(static_cast<const T*>(p.x) + row * p.x_stride, static_cast<const T*>(p.residual) + row * p.residual_stride, p.width, sum);
      rms_norm_row<T>(sum, p.weight, nullptr, p.width, p.eps, static_cast<T*>(p.out) + row * p.out_stride);  // sum is in L1 now
    });
  });
}

}  // namespace stretto::STRETTO_ISA
