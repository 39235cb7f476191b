// Where to cut a set of tokens ordered by (logit falling, id rising), without sorting it. For *_cpu.cpp only.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

inline constexpr int kBins = 1024;
inline constexpr int64_t kSorted = 48;  // so many are ordered by insertion

struct Pool {  // tokens in rising order of id
  int32_t* id;
  float *logit, *mass;  // mass may be null where only counts matter
  int64_t size;
};
struct Cut {
  float logit;
  int32_t id;
};  // kept: a larger logit, or this logit and an id not above this one
STRETTO_INLINE bool kept(const Cut& c, float logit, int32_t id) { return logit > c.logit || (logit == c.logit && id <= c.id); }

struct Bins { double weight[kBins]; };

// Linear bins from `high` down to `low`; monotone in the logit, which is all that is needed. An infinity counts as a number beyond
// the range of float: with it as it is, every logit would share one bin, and the search would not end.
struct BinScale {
  double high, per_unit;
  BinScale(float low, float top) : high(finite(top)), per_unit(kBins / (high - finite(low))) {}
  static double finite(float x) {
    constexpr double kBeyond = 6.8e38;
    return double(x) < -kBeyond ? -kBeyond : double(x) > kBeyond ? kBeyond : double(x);
  }
  int operator()(float logit) const {
    const double b = (high - finite(logit)) * per_unit;
    return b < kBins - 1 ? static_cast<int>(b) : kBins - 1;
  }
};

// The token at which the running weight first reaches `target`; the last token if it never does.
// weight: pool.mass, or one each where by_count. index: scratch of pool.size entries.
static inline Cut find_cut(const Pool& pool, bool by_count, double target, int32_t* index, Bins& bins) {
  int64_t n = pool.size;
  for (int64_t i = 0; i < n; ++i) index[i] = static_cast<int32_t>(i);
  const auto weight = [&](int32_t i) { return by_count ? 1.0 : double(pool.mass[i]); };
  double reached = 0;
  while (n > kSorted) {
    float low = pool.logit[index[0]], high = low;
    for (int64_t i = 1; i < n; ++i) {
      const float l = pool.logit[index[i]];
      low = l < low ? l : low;
      high = l > high ? l : high;
    }
    if (low == high) {  // all equal: ids rise along the list
      for (int64_t i = 0; i < n; ++i)
        if ((reached += weight(index[i])) >= target) return {low, pool.id[index[i]]};
      return {low, pool.id[index[n - 1]]};
    }
    const BinScale bin(low, high);
    for (int b = 0; b < kBins; ++b) bins.weight[b] = 0;
    for (int64_t i = 0; i < n; ++i) bins.weight[bin(pool.logit[index[i]])] += weight(index[i]);
    int at = 0;
    while (at < kBins - 1 && reached + bins.weight[at] < target) reached += bins.weight[at++];
    int64_t left = 0;  // at least one stays: bin 0 holds the highest logit, the last bin the lowest, any other has weight
    for (int64_t i = 0; i < n; ++i) {
      const int32_t j = index[i];
      index[left] = j;
      left += bin(pool.logit[j]) == at;
    }
    n = left;
  }
  for (int64_t i = 1; i < n; ++i) {  // stable: equal logits stay in the order of their ids
    const int32_t j = index[i];
    int64_t k = i;
    for (; k > 0 && pool.logit[index[k - 1]] < pool.logit[j]; --k) index[k] = index[k - 1];
    index[k] = j;
  }
  int64_t last = 0;
  while (last < n - 1 && (reached += weight(index[last])) < target) ++last;
  return {pool.logit[index[last]], pool.id[index[last]]};
}

}  // namespace stretto::STRETTO_ISA
