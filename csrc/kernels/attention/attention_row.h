// What is done to one row of scores, and how the splits of a row are joined. For *_cpu.cpp only.
#pragma once
#include "kernels/attention/attention_tile.h"

namespace stretto::STRETTO_ISA {

// One split of one row, or several joined: the largest score, the sum of weights e^(score - m), and the weighted sum of values.
// l == 0 marks a part without keys, whose acc is not read (with keys, l >= 1 or NaN).
struct Part {
  float m, l;
  float* acc;
};

// into = into + next, in this order: each row joins its splits from first to last.
STRETTO_INLINE void merge(Part& into, const Part& next, int64_t head_dim) {
  if (next.l == 0.f) return;
  if (into.l == 0.f) {
    into.m = next.m, into.l = next.l;
    for (int64_t i = 0; i < head_dim; i += kLanes) store(into.acc + i, load(next.acc + i));
    return;
  }
  const float m = into.m > next.m ? into.m : next.m;
  float differences[16] = {into.m - m, next.m - m};  // one of them is 0, unless a NaN or an infinity is about
  store(differences, exp(load(differences)));
  const f32x16 a = broadcast(differences[0]), b = broadcast(differences[1]);
  float l[16];
  store(l, fma(b, broadcast(next.l), mul(a, broadcast(into.l))));
  into.m = m, into.l = l[0];
  for (int64_t i = 0; i < head_dim; i += kLanes) store(into.acc + i, fma(b, load(next.acc + i), mul(a, load(into.acc + i))));
}

STRETTO_INLINE void finish(const Part& p, int64_t head_dim, float* out) {
  if (p.l == 0.f) {
    for (int64_t i = 0; i < head_dim; i += kLanes) store(out + i, zero());
    return;
  }
  const f32x16 l = broadcast(p.l);
  for (int64_t i = 0; i < head_dim; i += kLanes) store(out + i, div(load(p.acc + i), l));
}

// scores[begin, end) of a split become weights; lanes of the first and last vector outside of it become 0. begin < end.
STRETTO_INLINE void softmax_row(float* scores, int begin, int end, float softcap, float* m_out, float* l_out) {
  const int first = begin & ~(kLanes - 1), last = (end + kLanes - 1) & ~(kLanes - 1);
  if (softcap > 0.f) {
    const f32x16 cap = broadcast(softcap), two_over_cap = broadcast(2.f / softcap), one = broadcast(1.f), two = broadcast(2.f);
    for (int j = first; j < last; j += kLanes)  // tanh x = 1 - 2 / (e^2x + 1)
      store(scores + j, mul(cap, sub(one, div(two, add(exp(mul(load(scores + j), two_over_cap)), one)))));
  }
  for (int j = first; j < begin; ++j) scores[j] = -__builtin_inff();
  for (int j = end; j < last; ++j) scores[j] = -__builtin_inff();
  f32x16 largest = broadcast(-__builtin_inff());
  for (int j = first; j < last; j += kLanes) largest = max(load(scores + j), largest);  // a NaN is passed over here, and met below
  const float m = reduce_max(largest);
  const f32x16 shift = broadcast(m);
  f32x16 sum = zero();
  for (int j = first; j < last; j += kLanes) {
    const f32x16 w = exp(sub(load(scores + j), shift));
    store(scores + j, w);
    sum = add(sum, w);
  }
  *m_out = m;
  *l_out = reduce_add(sum);
}

}  // namespace stretto::STRETTO_ISA
