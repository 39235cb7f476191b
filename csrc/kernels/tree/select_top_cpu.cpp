#include "kernels/tree/select_top.h"

#include "common/parallel.h"
#include "kernels/sampling/select.h"

namespace stretto::STRETTO_ISA {
namespace {

bool valid_candidates(const int32_t* parent, int64_t n) {
  if (n > 0 && parent[0] != -1) return false;
  for (int64_t i = 1; i < n; ++i)
    if (parent[i] < -1 || parent[i] >= i) return false;
  return true;
}

void select_row(const SelectTopParams& p, int64_t b) {
  const int64_t count = p.candidates;
  const float* scores = p.scores + b * count;
  const int32_t* parent = p.parent + b * count;
  int32_t* out = p.out + b * p.keep;
  for (int64_t i = 0; i < p.keep; ++i) out[i] = -1;
  if (count == 0 || !valid_candidates(parent, count)) return;
  char* scratch = static_cast<char*>(thread_scratch(0, static_cast<int64_t>(sizeof(Bins)) + count * 16));
  Bins& bins = *reinterpret_cast<Bins*>(scratch);
  float* least = reinterpret_cast<float*>(scratch + sizeof(Bins));  // on the path from the root, by candidate
  Pool pool{reinterpret_cast<int32_t*>(least + count), least + 2 * count, nullptr, 0};
  int32_t* index = reinterpret_cast<int32_t*>(least + 3 * count);
  const float nothing = -__builtin_inff();
  least[0] = __builtin_inff();
  for (int64_t i = 1; i < count; ++i) {
    const float above = parent[i] < 0 ? nothing : least[parent[i]];
    least[i] = scores[i] < above ? scores[i] : scores[i] >= above ? above : nothing;  // NaN compares false twice
    if (least[i] == nothing) continue;
    pool.id[pool.size] = static_cast<int32_t>(i);
    pool.logit[pool.size++] = least[i];
  }
  int64_t n = 0;
  out[n++] = 0;
  if (p.keep == 1 || pool.size == 0) return;
  const Cut cut = pool.size < p.keep ? Cut{nothing, 0} : find_cut(pool, true, static_cast<double>(p.keep - 1), index, bins);
  for (int64_t i = 0; i < pool.size; ++i)
    if (kept(cut, pool.logit[i], pool.id[i])) out[n++] = pool.id[i];
}

}  // namespace

void select_top(const SelectTopParams& p) {
  parallel_for(0, p.batch, 1024 / (p.candidates + 1) + 1, [&](int64_t b) { select_row(p, b); });
}

}  // namespace stretto::STRETTO_ISA
