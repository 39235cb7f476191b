#include "kernels/moe/topk_route.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

static constexpr float kLowest = -3.402823466e38f, kTaken = -__builtin_inff();

// -inf and NaN become the lowest finite number; -inf then marks what cannot be chosen (any more).
STRETTO_INLINE f32x16 rankable(f32x16 v) { return max(v, broadcast(kLowest)); }  // max gives its second operand where the first is NaN

// Logits of a row as floats into `out`, padded to whole vectors with `pad`.
template <class T> static void widen(const T* logits, int64_t n, float pad, float* out) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(logits + i));
  if (whole < n) {
    for (int64_t i = n; i < whole + kLanes; ++i) out[i] = pad;
    for (int64_t i = whole; i < n; ++i) out[i] = to_float(logits[i]);
  }
}

// Softmax in place; the padding is -inf and becomes 0. A NaN or +inf anywhere makes every score NaN.
static void softmax(float* v, int64_t padded) {
  f32x16 top = broadcast(kTaken);
  for (int64_t i = 0; i < padded; i += kLanes) top = max(load(v + i), top);
  const f32x16 highest = broadcast(reduce_max(top));
  f32x16 sums = zero();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const f32x16 e = exp(sub(load(v + i), highest));
    store(v + i, e);
    sums = add(sums, e);
  }
  const f32x16 total = broadcast(reduce_add(sums));
  for (int64_t i = 0; i < padded; i += kLanes) store(v + i, div(load(v + i), total));
}

static void sigmoid(float* v, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kLanes) store(v + i, div(broadcast(1.f), add(broadcast(1.f), exp(sub(zero(), load(v + i))))));
}

// Marks the experts of all but the best groups as taken.
static void keep_groups(const TopkRouteParams& p, float* choice, float* of_group) {
  const int64_t size = p.experts / p.groups;
  for (int64_t g = 0; g < p.groups; ++g) {
    float first = kTaken, second = kTaken;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const float c = choice[i], beaten = c > first ? first : c;
      first = c > first ? c : first;
      second = beaten > second ? beaten : second;
    }
    const float sum = p.group_top == 2 && size > 1 ? first + second : first;
    of_group[g] = sum > kLowest ? sum : kLowest;  // two lowest numbers overflow
  }
  for (int64_t kept = 0; kept < p.top_groups; ++kept) {
    int64_t best = 0;
    while (of_group[best] != of_group[best]) ++best;  // NaN marks a kept group
    for (int64_t g = best + 1; g < p.groups; ++g)
      if (of_group[g] > of_group[best]) best = g;
    of_group[best] = __builtin_nanf("");
  }
  for (int64_t g = 0; g < p.groups; ++g)
    if (of_group[g] == of_group[g])
      for (int64_t i = g * size; i < (g + 1) * size; ++i) choice[i] = kTaken;
}

// The first place of the largest choice, which is then taken.
STRETTO_INLINE int64_t take_best(float* choice, int64_t padded) {
  f32x16 top = load(choice);
  for (int64_t i = kLanes; i < padded; i += kLanes) top = max(load(choice + i), top);
  const f32x16 highest = broadcast(reduce_max(top));
  for (int64_t i = 0;; i += kLanes)
    if (const uint32_t there = mask_ge(load(choice + i), highest)) {
      const int64_t best = i + __builtin_ctz(there);
      choice[best] = kTaken;
      return best;
    }
}

template <class T> static void route_row(const TopkRouteParams& p, int64_t row, float* buffer) {
  const int64_t padded = (p.experts + kLanes - 1) / kLanes * kLanes;
  float *score = buffer, *choice = buffer + padded, *of_group = choice + padded;
  const bool by_logits = !p.bias && p.groups == 1;
  widen(static_cast<const T*>(p.logits) + row * p.logits_stride, p.experts, kTaken, score);
  if (by_logits)
    for (int64_t i = 0; i < padded; i += kLanes) store(choice + i, rankable(load(score + i)));
  p.sigmoid ? sigmoid(score, padded) : softmax(score, padded);
  if (!by_logits)
    for (int64_t i = 0; i < padded; i += kLanes) {
      const int real = static_cast<int>(p.experts - i < kLanes ? p.experts - i : kLanes);
      store(choice + i, rankable(p.bias ? add(load(score + i), load_first(p.bias + i, real)) : load(score + i)));
    }
  for (int64_t i = p.experts; i < padded; ++i) choice[i] = kTaken;
  if (p.groups > 1) keep_groups(p, choice, of_group);
  float* weights = p.weights + row * p.k;
  float sum = 0.f;
  for (int64_t j = 0; j < p.k; ++j) {
    const int64_t best = take_best(choice, padded);
    p.chosen[row * p.k + j] = static_cast<int32_t>(best);
    weights[j] = score[best];
    sum += score[best];
  }
  const float divisor = p.renormalise ? sum + 1e-20f : 1.f;  // the models add it, so that a row without any score gives zeros
  for (int64_t j = 0; j < p.k; ++j) weights[j] = weights[j] / divisor * p.scale;
}

void topk_route(const TopkRouteParams& p) {
  const int64_t tokens = p.num_rows && *p.num_rows < p.tokens ? *p.num_rows : p.tokens;
  const int64_t padded = (p.experts + kLanes - 1) / kLanes * kLanes;
  const int64_t work = (p.k + 8) * padded;         // vector steps of a row, times 16
  const int64_t grain = 65536 / (work + 256) + 1;  // about 5 us a task
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, tokens, grain, [&](int64_t row) {
      route_row<T>(p, row, static_cast<float*>(thread_scratch(0, (2 * padded + p.groups) * static_cast<int64_t>(sizeof(float)))));
    });
  });
}

}  // namespace stretto::STRETTO_ISA
