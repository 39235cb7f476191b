#include "kernels/sampling/argmax.h"

#include "common/parallel.h"
#include "kernels/sampling/row_scan.h"

namespace stretto::STRETTO_ISA {

void argmax(const ArgmaxParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const int64_t grain = 32768 / (p.width + 1) + 1;  // about 128 KB a task: 5 us, several times the hand-over
  parallel_for(0, rows, grain, [&](int64_t row) {
    const RowScan scan = scan_row(p.logits + row * p.stride, p.width, nullptr);
    p.out[row] = scan.argmax;
    if (p.status) p.status[row] = scan.status;
  });
}

}  // namespace stretto::STRETTO_ISA
