// Lane functions of the scan family, and tiles that turn [channel, state] memory into lanes over channels and back.
// For *_cpu.cpp only, like common/simd.h.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

// 2^(d a) with one rounding of d a; at most 1.5 ulps of error. n = round(d a) by adding 1.5 * 2^23, whose low bits then hold n;
// 2^r on |r| <= 1/2 by a polynomial fitted with the value 1 at 0, so that the factors of slow decays, multiplied thousands of times,
// carry no bias. Valid for -125.9 <= d a <= 127.5: see decay() for the rest.
STRETTO_INLINE f32x16 decay_in_range(f32x16 d, f32x16 a) {
  const f32x16 magic = broadcast(12582912.f);
  const f32x16 t = fma(d, a, magic);
  const f32x16 r = fma(d, a, sub(magic, t));
  f32x16 p = broadcast(0x1.5bb988p-10f);
  p = fma(p, r, broadcast(0x1.3ceb1p-7f));
  p = fma(p, r, broadcast(0x1.c6b758p-5f));
  p = fma(p, r, broadcast(0x1.ebf9bap-3f));
  p = fma(p, r, broadcast(0x1.62e42ap-1f));
  p = fma(p, r, broadcast(1.f));
#if defined(STRETTO_ISA_avx512)
  return {_mm512_scalef_ps(p.v, sub(t, magic).v)};
#elif defined(STRETTO_ISA_avx2)
  const auto scaled = [](__m256 v, __m256 by) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(by), 23)));
  };
  return {scaled(p.lo, t.lo), scaled(p.hi, t.hi)};
#else
  f32x16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = bits_to_float(float_to_bits(p.v[i]) + (float_to_bits(t.v[i]) << 23));
  return out;
#endif
}

// Per lane: where x > at, a; else b. NaN x: b.
STRETTO_INLINE f32x16 where_greater(f32x16 x, float at, f32x16 a, f32x16 b) {
#if defined(STRETTO_ISA_avx512)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(at), _CMP_GT_OQ), b.v, a.v)};
#elif defined(STRETTO_ISA_avx2)
  const __m256 limit = _mm256_set1_ps(at);
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, limit, _CMP_GT_OQ)), _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, limit, _CMP_GT_OQ))};
#else
  f32x16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = x.v[i] > at ? a.v[i] : b.v[i];
  return out;
#endif
}

// 2^(d a) for any operands: 0 below -125.9, infinity above 127.5, NaN for NaN; where decay_in_range is valid, its bits.
STRETTO_INLINE f32x16 decay(f32x16 d, f32x16 a) {
  const f32x16 x = mul(d, a);
  const f32x16 inside = decay_in_range(d, a);
  const f32x16 nan_kept = add(x, x);  // x is NaN where d or a is, or 0 * infinity; the range reduction may lose that
  const f32x16 upper = where_greater(x, 127.5f, broadcast(__builtin_inff()), where_greater(x, -125.9f, inside, zero()));
#if defined(STRETTO_ISA_avx512)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), upper.v, nan_kept.v)};
#elif defined(STRETTO_ISA_avx2)
  return {_mm256_blendv_ps(upper.lo, nan_kept.lo, _mm256_cmp_ps(x.lo, x.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(upper.hi, nan_kept.hi, _mm256_cmp_ps(x.hi, x.hi, _CMP_UNORD_Q))};
#else
  f32x16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = x.v[i] != x.v[i] ? nan_kept.v[i] : upper.v[i];
  return out;
#endif
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p(v) = 2 atanh(v / (2 + v)) as a polynomial in the square of its argument, which is
// at most 1/9: no cancellation for very negative x. NaN stays NaN.
STRETTO_INLINE f32x16 softplus(f32x16 x) {
  const f32x16 magnitude = max(sub(zero(), x), x);
  const f32x16 v = exp(sub(zero(), magnitude));
  const f32x16 s = div(v, add(v, broadcast(2.f))), w = mul(s, s);
  f32x16 p = broadcast(0.14005995f);
  p = fma(p, w, broadcast(0.14000903f));
  p = fma(p, w, broadcast(0.20010763f));
  p = fma(p, w, broadcast(0.3333321f));
  p = fma(mul(p, w), s, s);
  return add(max(zero(), x), add(p, p));
}

STRETTO_INLINE f32x16 sigmoid(f32x16 x) { return div(broadcast(1.f), add(broadcast(1.f), exp(sub(zero(), x)))); }
STRETTO_INLINE f32x16 silu(f32x16 x) { return div(x, add(broadcast(1.f), exp(sub(zero(), x)))); }

// `n` of 16 elements: all of them is the common case and costs no more than a plain load.
template <class T> STRETTO_INLINE f32x16 load_n(const T* p, int n) { return n == kLanes ? load(p) : load_some(p, n); }
template <class T> STRETTO_INLINE void store_n(T* p, f32x16 a, int n) { n == kLanes ? store(p, a) : store_some(p, a, n); }

// Transposes 16 x 16 floats: out[i][l] = in[l][i].
STRETTO_INLINE void transpose16(const f32x16 (&in)[16], f32x16 (&out)[16]) {
#if defined(STRETTO_ISA_avx512)
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(in[i].v, in[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(in[i].v, in[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
    b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
    b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
  }
  // b[4 g + i] holds, in quarter q, elements 4 q + i of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low01 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x44), high01 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xee);
    const __m512 low23 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x44), high23 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xee);
    out[i].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    out[4 + i].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    out[8 + i].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    out[12 + i].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
#elif defined(STRETTO_ISA_avx2)
  const auto eight = [](const __m256(&r)[8], __m256(&o)[8]) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      o[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      o[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  };
  for (int half = 0; half < 2; ++half) {
    __m256 r[8], o[8];
    for (int i = 0; i < 8; ++i) r[i] = in[8 * half + i].lo;
    eight(r, o);
    for (int i = 0; i < 8; ++i) (half ? out[i].hi : out[i].lo) = o[i];
    for (int i = 0; i < 8; ++i) r[i] = in[8 * half + i].hi;
    eight(r, o);
    for (int i = 0; i < 8; ++i) (half ? out[8 + i].hi : out[8 + i].lo) = o[i];
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int l = 0; l < 16; ++l) out[i].v[l] = in[l].v[i];
#endif
}

// tile[k][l] = p[l * row_stride + k * column_stride] for l < lanes and k < columns; lanes from `lanes` on are zero.
STRETTO_INLINE void load_columns(float* tile, const float* p, int64_t row_stride, int64_t column_stride, int lanes, int64_t columns) {
  if (row_stride == 1 && lanes == kLanes) {
    for (int64_t k = 0; k < columns; ++k) store(tile + k * kLanes, load(p + k * column_stride));
    return;
  }
  int64_t k = 0;
  if (column_stride == 1 && lanes == kLanes) {
    for (; k + kLanes <= columns; k += kLanes) {
      f32x16 rows[16], turned[16];
      for (int l = 0; l < kLanes; ++l) rows[l] = load(p + l * row_stride + k);
      transpose16(rows, turned);
      for (int i = 0; i < kLanes; ++i) store(tile + (k + i) * kLanes, turned[i]);
    }
  }
  for (; k < columns; ++k) {
    for (int l = 0; l < lanes; ++l) tile[k * kLanes + l] = p[l * row_stride + k * column_stride];
    for (int l = lanes; l < kLanes; ++l) tile[k * kLanes + l] = 0.f;
  }
}

// The way back.
STRETTO_INLINE void store_columns(float* p, const float* tile, int64_t row_stride, int64_t column_stride, int lanes, int64_t columns) {
  if (row_stride == 1 && lanes == kLanes) {
    for (int64_t k = 0; k < columns; ++k) store(p + k * column_stride, load(tile + k * kLanes));
    return;
  }
  int64_t k = 0;
  if (column_stride == 1 && lanes == kLanes) {
    for (; k + kLanes <= columns; k += kLanes) {
      f32x16 rows[16], turned[16];
      for (int i = 0; i < kLanes; ++i) rows[i] = load(tile + (k + i) * kLanes);
      transpose16(rows, turned);
      for (int l = 0; l < kLanes; ++l) store(p + l * row_stride + k, turned[l]);
    }
  }
  for (; k < columns; ++k)
    for (int l = 0; l < lanes; ++l) p[l * row_stride + k * column_stride] = tile[k * kLanes + l];
}

}  // namespace stretto::STRETTO_ISA
