#include "kernels/sampling/warp.h"

#include "common/parallel.h"
#include "kernels/sampling/row_scan.h"
#include "kernels/sampling/select.h"

namespace stretto::STRETTO_ISA {
namespace {

struct Scratch {
  float* maxima;  // [width / kScanChunk * 16]
  Pool pool;
  int32_t* index;
  Bins* bins;

  explicit Scratch(int64_t width) {
    const int64_t padded = (width + 15) / 16 * 16;
    char* at = static_cast<char*>(thread_scratch(0, padded * 5 * 4 + static_cast<int64_t>(sizeof(Bins))));
    bins = reinterpret_cast<Bins*>(at), at += sizeof(Bins);
    pool.id = reinterpret_cast<int32_t*>(at), at += padded * 4;
    pool.logit = reinterpret_cast<float*>(at), at += padded * 4;
    pool.mass = reinterpret_cast<float*>(at), at += padded * 4;
    index = reinterpret_cast<int32_t*>(at), at += padded * 4;
    maxima = reinterpret_cast<float*>(at);
    pool.size = 0;
  }
};

struct Row {
  const float* logits;
  float* out;
  int64_t width;
  float max, temperature;

  f32x16 weight(f32x16 logit) const { return exp(div(sub(logit, broadcast(max)), broadcast(temperature))); }
};

// out = weights of all tokens; returns their sum. Lanes are summed in float over 256 elements, then in double.
double weigh_all(const Row& r) {
  double total = 0;
  int64_t i = 0;
  for (; i + kScanChunk <= r.width; i += kScanChunk) {
    f32x16 sum = zero();
    for (int64_t j = i; j < i + kScanChunk; j += kLanes) {
      const f32x16 e = r.weight(load(r.logits + j));
      store(r.out + j, e);
      sum = add(sum, e);
    }
    total += reduce_add(sum);
  }
  for (; i < r.width; i += kLanes) {
    const int n = r.width - i < kLanes ? static_cast<int>(r.width - i) : kLanes;
    const f32x16 e = r.weight(load_some(r.logits + i, n));
    store_some(r.out + i, e, n);
    for (int64_t j = i; j < i + n; ++j) total += r.out[j];
  }
  return total;
}

// The pool becomes every token with logit >= floor.
void collect(const Row& r, float floor, Pool& pool) {
  int64_t n = 0, i = 0;
  const auto take = [&](int64_t id) {
    pool.id[n] = static_cast<int32_t>(id);
    pool.logit[n++] = r.logits[id];
  };
  const f32x16 bound = broadcast(floor);
  for (; i + kLanes <= r.width; i += kLanes)
    for (uint32_t m = mask_ge(load(r.logits + i), bound); m; m &= m - 1) take(i + __builtin_ctz(m));
  for (; i < r.width; ++i)
    if (r.logits[i] >= floor) take(i);
  pool.size = n;
}

void weigh_pool(const Row& r, Pool& pool) {
  for (int64_t i = 0; i < pool.size; i += kLanes) {  // the arrays are padded to whole vectors; what is behind size is not used
    const int n = pool.size - i < kLanes ? static_cast<int>(pool.size - i) : kLanes;
    store(pool.mass + i, r.weight(load_some(pool.logit + i, n)));
  }
}

double pool_mass(const Pool& pool) {
  double total = 0;
  for (int64_t i = 0; i < pool.size; ++i) total += pool.mass[i];
  return total;
}

template <class Keep> void filter(Pool& pool, const Keep& keep) {
  int64_t n = 0;
  for (int64_t i = 0; i < pool.size; ++i) {
    const bool stays = keep(i);
    pool.id[n] = pool.id[i], pool.logit[n] = pool.logit[i], pool.mass[n] = pool.mass[i];
    n += stays;
  }
  pool.size = n;
}

void cut_to(Pool& pool, const Cut& cut) {
  filter(pool, [&](int64_t i) { return kept(cut, pool.logit[i], pool.id[i]); });
}

// A logit that at least k tokens reach: the k-th largest of maxima over disjoint groups cannot exceed the k-th largest of all.
float top_k_floor(const Row& r, int64_t k, Scratch& s) {
  const int64_t groups = r.width / kScanChunk * kLanes;
  if (k > groups) return -__builtin_inff();
  for (int64_t i = 0; i < groups; ++i) s.pool.id[i] = static_cast<int32_t>(i);
  const Pool maxima{s.pool.id, s.maxima, nullptr, groups};
  return find_cut(maxima, true, static_cast<double>(k), s.index, *s.bins).logit;
}

// A logit below which all tokens together weigh less than (1 - top_p) * total, so that top_p cuts at or above it. Each token below
// weighs less than (1 - top_p) * total / width; the margin of 0.01 covers the rounding of exp and log.
float top_p_floor(const Row& r, float top_p, double total) {
  const double each = (1.0 - double(top_p)) * total / static_cast<double>(r.width);
  return static_cast<float>(double(r.max) + double(r.temperature) * (__builtin_log(each) - 0.01));
}

float min_p_floor(const Row& r, float min_p) {
  return static_cast<float>(double(r.max) + double(r.temperature) * (__builtin_log(double(min_p)) - 0.01));
}

void warp_filtered(const Row& r, int64_t top_k, float top_p, float min_p, Scratch& s) {
  const bool by_k = top_k > 0 && top_k < r.width;
  double total = 0;
  if (by_k) {
    collect(r, top_k_floor(r, top_k, s), s.pool);
    cut_to(s.pool, find_cut(s.pool, true, static_cast<double>(top_k), s.index, *s.bins));
  } else if (top_p < 1) {
    total = weigh_all(r);
    collect(r, top_p_floor(r, top_p, total), s.pool);
  } else {
    collect(r, min_p_floor(r, min_p), s.pool);
  }
  weigh_pool(r, s.pool);
  if (top_p < 1) {
    const double target = double(top_p) * (by_k ? pool_mass(s.pool) : total);
    cut_to(s.pool, find_cut(s.pool, false, target, s.index, *s.bins));
  }
  if (min_p > 0) filter(s.pool, [&](int64_t i) { return s.pool.mass[i] >= min_p; });
  __builtin_memset(r.out, 0, static_cast<size_t>(r.width) * sizeof(float));
  const double sum = pool_mass(s.pool);
  for (int64_t i = 0; i < s.pool.size; ++i) r.out[s.pool.id[i]] = static_cast<float>(s.pool.mass[i] / sum);
}

int32_t check_row(const WarpParams& p, int64_t row) {
  const float t = p.temperature[row], top_p = p.top_p[row], min_p = p.min_p[row];
  const bool ok = t >= 0 && t < __builtin_inff() && p.top_k[row] >= 0 && top_p >= 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
  return ok ? kRowFinite : kRowBadArgument;
}

void warp_row(const WarpParams& p, int64_t row) {
  Scratch s(p.width);
  Row r{p.logits + row * p.logits_stride, p.out + row * p.out_stride, p.width, 0, p.temperature[row]};
  const int64_t top_k = p.top_k[row];
  const float top_p = p.top_p[row], min_p = p.min_p[row];
  int32_t status = check_row(p, row);
  RowScan scan{0, -1, kRowBroken};
  if (status == kRowFinite) scan = scan_row(r.logits, r.width, s.maxima), status = scan.status;
  if (p.status) p.status[row] = status;
  if (status == kRowBroken || status == kRowBadArgument) {
    for (int64_t i = 0; i < r.width; ++i) r.out[i] = __builtin_nanf("");
    return;
  }
  r.max = scan.max;
  if (r.temperature == 0) {
    __builtin_memset(r.out, 0, static_cast<size_t>(r.width) * sizeof(float));
    r.out[scan.argmax] = 1.f;
  } else if ((top_k > 0 && top_k < r.width) || top_p < 1 || min_p > 0) {
    warp_filtered(r, top_k, top_p, min_p, s);
  } else {
    const float scale = static_cast<float>(1.0 / weigh_all(r));
    for (int64_t i = 0; i < r.width; ++i) r.out[i] *= scale;
  }
}

}  // namespace

void warp(const WarpParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const int64_t grain = 4096 / (p.width + 1) + 1;
  parallel_for(0, rows, grain, [&](int64_t row) { warp_row(p, row); });
}

}  // namespace stretto::STRETTO_ISA
