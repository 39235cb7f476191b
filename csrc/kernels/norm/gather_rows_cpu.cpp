#include "kernels/norm/gather_rows.h"

#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

void gather_rows(const GatherRowsParams& p) {
  const int64_t count = p.num_rows && *p.num_rows < p.count ? *p.num_rows : p.count;
  const int64_t grain = 16384 / (p.width + 1) + 1;  // about 64 KB a task
  parallel_for(0, count, grain, [&](int64_t i) {
    const int64_t row = p.rows[i];
    float* out = p.out + i * p.out_stride;
    const size_t bytes = static_cast<size_t>(p.width) * sizeof(float);
    if (row >= 0 && row < p.num_x) std::memcpy(out, p.x + row * p.x_stride, bytes);
    else std::memset(out, 0, bytes);
  });
}

}  // namespace stretto::STRETTO_ISA
