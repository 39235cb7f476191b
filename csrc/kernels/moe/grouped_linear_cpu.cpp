#include "kernels/moe/grouped_linear.h"

#include <cstring>

#include "common/simd.h"

namespace stretto::STRETTO_ISA {

void grouped_linear(const GroupedLinearParams& p) {
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t first = p.offsets[e] < 0 ? 0 : p.offsets[e], last = p.offsets[e + 1] < p.all.rows ? p.offsets[e + 1] : p.all.rows;
    if (first >= last) continue;
    LinearParams group = p.all;
    group.packed += e * p.packed_bytes;
    group.x += first * p.all.x_stride;
    group.out += first * p.all.out_stride;
    group.rows = last - first;
    linear(group);
  }
  const int64_t columns = p.all.gate == Gate::none ? p.all.n : p.all.n / 2, used = p.offsets[p.experts] < 0 ? 0 : p.offsets[p.experts];
  for (int64_t r = used; r < p.all.rows; ++r) std::memset(p.all.out + r * p.all.out_stride, 0, static_cast<size_t>(columns) * sizeof(float));
}

}  // namespace stretto::STRETTO_ISA
