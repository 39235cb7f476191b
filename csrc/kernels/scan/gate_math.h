// Gate functions of recurrent cells on sixteen lanes. Each stays within 3 ulps over its range; NaN stays NaN.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r - 1 by its Taylor polynomial of degree 7: one more than exp of simd.h has, since a decay
// is applied once a token and its error adds up.
struct Reduced { f32x16 n, expm1_r; };
STRETTO_INLINE Reduced reduce_exp(f32x16 x) {
  const f32x16 n = round_even(mul(x, broadcast(1.44269504088896341f)));
  f32x16 r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  f32x16 p = broadcast(1.f / 5040);
  p = fma(p, r, broadcast(1.f / 720));
  p = fma(p, r, broadcast(1.f / 120));
  p = fma(p, r, broadcast(1.f / 24));
  p = fma(p, r, broadcast(1.f / 6));
  p = fma(p, r, broadcast(0.5f));
  return {n, fma(p, mul(r, r), r)};
}

// e^x - 1 for x in [-40, 40], without cancellation near 0.
STRETTO_INLINE f32x16 expm1_bounded(f32x16 x) {
  const Reduced e = reduce_exp(x);
  const f32x16 power = exp2_integral(e.n);
  return fma(e.expm1_r, power, sub(power, broadcast(1.f)));
}

// e^x: 0 below -87.33 and infinity above 88.37, as exp of simd.h.
STRETTO_INLINE f32x16 exp_gate(f32x16 x) {
  constexpr float kLow = -87.3365447505531f, kHigh = 88.3762626647949f;
  const Reduced e = reduce_exp(min(broadcast(kHigh), max(broadcast(kLow), x)));
  const f32x16 power = exp2_integral(e.n), result = fma(e.expm1_r, power, power);
  if ((mask_ge(x, broadcast(kLow)) & mask_ge(broadcast(kHigh), x)) == 0xffffu) return result;
  float at[kLanes], lanes[kLanes];  // rare
  store(at, x);
  store(lanes, result);
  for (int i = 0; i < kLanes; ++i) lanes[i] = at[i] < kLow ? 0.f : at[i] > kHigh ? __builtin_inff() : lanes[i];
  return load(lanes);
}

STRETTO_INLINE f32x16 negate(f32x16 x) { return sub(zero(), x); }

// tanh(|x|) = -e / (e + 2) with e = e^(-2|x|) - 1; beyond 10 it is 1 in float. The sign is x times a large number, clamped.
STRETTO_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 e = expm1_bounded(max(broadcast(-20.f), min(negate(add(x, x)), add(x, x))));
  const f32x16 sign = max(broadcast(-1.f), min(broadcast(1.f), mul(x, broadcast(-3e38f))));
  return mul(sign, div(e, add(e, broadcast(2.f))));
}

// log(1 + u) for u in [0, 1]: u + u^2 p(u), p interpolated at the Chebyshev nodes of [0, 1]; the fit errs by 0.3 ulp.
STRETTO_INLINE f32x16 log1p_unit(f32x16 u) {
  f32x16 p = broadcast(-0.00446621142f);
  p = fma(p, u, broadcast(0.0252240542f));
  p = fma(p, u, broadcast(-0.0667577237f));
  p = fma(p, u, broadcast(0.115618452f));
  p = fma(p, u, broadcast(-0.158475652f));
  p = fma(p, u, broadcast(0.19854106f));
  p = fma(p, u, broadcast(-0.249865264f));
  p = fma(p, u, broadcast(0.333328426f));
  p = fma(p, u, broadcast(-0.49999997f));
  return fma(p, mul(u, u), u);
}

STRETTO_INLINE f32x16 log_sigmoid(f32x16 x) { return sub(min(zero(), x), log1p_unit(exp_gate(negate(max(x, negate(x)))))); }

STRETTO_INLINE f32x16 sigmoid(f32x16 x) { return div(broadcast(1.f), add(broadcast(1.f), exp_gate(negate(x)))); }

STRETTO_INLINE f32x16 soft_cap(f32x16 x, float cap) { return mul(broadcast(cap), tanh(div(x, broadcast(cap)))); }

}  // namespace stretto::STRETTO_ISA
