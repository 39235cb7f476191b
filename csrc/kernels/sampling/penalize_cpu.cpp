#include "kernels/sampling/penalize.h"

#include "common/parallel.h"

namespace stretto::STRETTO_ISA {
namespace {

struct Range { int64_t begin, end; };

// Row's part of a ragged array; offsets that lie are clipped to what is there.
Range ragged(const int32_t* cu, int64_t row, int64_t total) {
  const int64_t begin = cu[row] < 0 ? 0 : cu[row], end = cu[row + 1] < total ? cu[row + 1] : total;
  return {begin, end};
}

void penalize_row(const PenalizeParams& p, int64_t row) {
  float* logits = p.logits + row * p.stride;
  const float repetition = p.repetition[row], presence = p.presence[row], frequency = p.frequency[row];
  const auto valid = [&](int32_t id) { return id >= 0 && id < p.width; };
  if (repetition != 1 || presence != 0 || frequency != 0) {
    const Range h = p.cu_history ? ragged(p.cu_history, row, p.total_history) : Range{row * p.history_width, (row + 1) * p.history_width};
    int32_t* count = static_cast<int32_t*>(thread_scratch(0, p.width * 4));  // only the entries of the history are ever touched
    for (int64_t i = h.begin; i < h.end; ++i)
      if (valid(p.history[i])) count[p.history[i]] = 0;
    for (int64_t i = h.begin; i < h.end; ++i)
      if (valid(p.history[i])) ++count[p.history[i]];
    for (int64_t i = h.begin; i < h.end; ++i) {
      const int32_t id = p.history[i];
      if (!valid(id) || count[id] == 0) continue;
      const float l = logits[id] > 0 ? logits[id] / repetition : logits[id] * repetition;
      logits[id] = l - (presence + frequency * static_cast<float>(count[id]));
      count[id] = 0;
    }
  }
  if (!p.bias_ids) return;
  const Range b = ragged(p.cu_bias, row, p.total_bias);
  for (int64_t i = b.begin; i < b.end; ++i)
    if (valid(p.bias_ids[i])) logits[p.bias_ids[i]] += p.bias_values[i];
}

}  // namespace

void penalize(const PenalizeParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  parallel_for(0, rows, 1, [&](int64_t row) { penalize_row(p, row); });
}

}  // namespace stretto::STRETTO_ISA
