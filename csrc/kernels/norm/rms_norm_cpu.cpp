#include "kernels/norm/rms_norm.h"

#include "common/parallel.h"
#include "kernels/norm/norm_row.h"

namespace stretto::STRETTO_ISA {

void rms_norm(const RmsNormParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const int64_t grain = 16384 / (p.width + 1) + 1;  // about 64 KB of floats a task: several times the hand-over
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, rows, grain, [&](int64_t row) {
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.residual_stride : nullptr;
      rms_norm_row(static_cast<const T*>(p.x) + row * p.x_stride, p.weight, residual, p.width, p.eps, static_cast<T*>(p.out) + row * p.out_stride);
    });
  });
}

}  // namespace stretto::STRETTO_ISA
