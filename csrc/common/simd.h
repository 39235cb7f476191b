// Sixteen float lanes, whatever the machine: one 512-bit register, two 256-bit ones, or an array. A kernel is written once on
// these; packed layouts and summation trees are the same for every instruction set.
//
// For *_cpu.cpp only: everything is in the namespace of the instruction set, so that no inline function compiled for one set can
// be picked by the linker for another. For the same reason those files use no std:: containers, streams or strings.
// avx2 and avx512 give the same bits (same operations in the same order); scalar has no fused multiply-add and differs in rounding.
#pragma once
#ifndef STRETTO_ISA
#error "common/simd.h is for *_cpu.cpp files, which are compiled once per instruction set"
#endif
#include <cstring>

#include "common/dtype.h"
#if !defined(STRETTO_ISA_scalar)
#include <immintrin.h>
#endif

namespace stretto::STRETTO_ISA {

inline constexpr int kLanes = 16;

#define STRETTO_INLINE static inline __attribute__((always_inline))

STRETTO_INLINE float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
STRETTO_INLINE uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

#if defined(STRETTO_ISA_avx512)

struct f32x16 { __m512 v; };
STRETTO_INLINE f32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
STRETTO_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
STRETTO_INLINE f32x16 load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)}; }
STRETTO_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
STRETTO_INLINE void store_first(float* p, f32x16 a, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v); }
STRETTO_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
STRETTO_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
STRETTO_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
STRETTO_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
STRETTO_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
STRETTO_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }                   // b where either is NaN
STRETTO_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
STRETTO_INLINE f32x16 round_even(f32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for integral n in [-126, 127]
STRETTO_INLINE f32x16 exp2_integral(f32x16 n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
STRETTO_INLINE f32x16 load(const half_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
STRETTO_INLINE void store(half_t* p, f32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
STRETTO_INLINE f32x16 load(const bfloat16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
STRETTO_INLINE f32x16 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
STRETTO_INLINE float sum8(__m256 s) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
STRETTO_INLINE float max8(__m256 s) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
STRETTO_INLINE __m256 low_half(f32x16 a) { return _mm512_castps512_ps256(a.v); }
STRETTO_INLINE __m256 high_half(f32x16 a) { return _mm512_extractf32x8_ps(a.v, 1); }

#elif defined(STRETTO_ISA_avx2)

struct f32x16 { __m256 lo, hi; };
STRETTO_INLINE __m256i first_mask8(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
STRETTO_INLINE f32x16 broadcast(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
STRETTO_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
STRETTO_INLINE f32x16 load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_mask8(n)), _mm256_maskload_ps(p + 8, first_mask8(n - 8))};
}
STRETTO_INLINE void store(float* p, f32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
STRETTO_INLINE void store_first(float* p, f32x16 a, int n) {
  _mm256_maskstore_ps(p, first_mask8(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_mask8(n - 8), a.hi);
}
STRETTO_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
STRETTO_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
STRETTO_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
STRETTO_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
STRETTO_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
STRETTO_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
STRETTO_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
STRETTO_INLINE f32x16 round_even(f32x16 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
STRETTO_INLINE __m256 exp2_integral8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
STRETTO_INLINE f32x16 exp2_integral(f32x16 n) { return {exp2_integral8(n.lo), exp2_integral8(n.hi)}; }
STRETTO_INLINE f32x16 load(const half_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
STRETTO_INLINE void store(half_t* p, f32x16 a) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
STRETTO_INLINE f32x16 load(const bfloat16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
STRETTO_INLINE f32x16 load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
STRETTO_INLINE float sum8(__m256 s) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
STRETTO_INLINE float max8(__m256 s) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
STRETTO_INLINE __m256 low_half(f32x16 a) { return a.lo; }
STRETTO_INLINE __m256 high_half(f32x16 a) { return a.hi; }

#else  // scalar: plain loops, vectorised to the baseline by the compiler

struct f32x16 { float v[16]; };
STRETTO_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);     // infinity, NaN
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));           // normal
  return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));  // subnormal: m * 2^-24
}
STRETTO_INLINE uint16_t float_to_half(float f) {  // round to nearest, ties to even
  const uint32_t b = float_to_bits(f), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                               // below 2^-14: let the adder do the rounding
    const float shifted = bits_to_float(magnitude) + 0.5f;                     // ulp of 0.5 is 2^-24, that of a subnormal half
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}
#define STRETTO_LANES(expr)                     \
  f32x16 r;                                     \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr); \
  return r
STRETTO_INLINE f32x16 broadcast(float x) { STRETTO_LANES(x); }
STRETTO_INLINE f32x16 load(const float* p) { STRETTO_LANES(p[i]); }
STRETTO_INLINE f32x16 load_first(const float* p, int n) { STRETTO_LANES(i < n ? p[i] : 0.f); }
STRETTO_INLINE void store(float* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
STRETTO_INLINE void store_first(float* p, f32x16 a, int n) {
  for (int i = 0; i < 16 && i < n; ++i) p[i] = a.v[i];
}
STRETTO_INLINE f32x16 add(f32x16 a, f32x16 b) { STRETTO_LANES(a.v[i] + b.v[i]); }
STRETTO_INLINE f32x16 sub(f32x16 a, f32x16 b) { STRETTO_LANES(a.v[i] - b.v[i]); }
STRETTO_INLINE f32x16 mul(f32x16 a, f32x16 b) { STRETTO_LANES(a.v[i] * b.v[i]); }
STRETTO_INLINE f32x16 div(f32x16 a, f32x16 b) { STRETTO_LANES(a.v[i] / b.v[i]); }
STRETTO_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { STRETTO_LANES(a.v[i] * b.v[i] + c.v[i]); }
STRETTO_INLINE f32x16 max(f32x16 a, f32x16 b) { STRETTO_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
STRETTO_INLINE f32x16 min(f32x16 a, f32x16 b) { STRETTO_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
STRETTO_INLINE f32x16 round_even(f32x16 a) { STRETTO_LANES(__builtin_rintf(a.v[i])); }
STRETTO_INLINE f32x16 exp2_integral(f32x16 n) { STRETTO_LANES(bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23)); }
STRETTO_INLINE f32x16 load(const half_t* p) { STRETTO_LANES(half_to_float(p[i].bits)); }
STRETTO_INLINE void store(half_t* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) p[i].bits = float_to_half(a.v[i]);
}
STRETTO_INLINE f32x16 load(const bfloat16_t* p) { STRETTO_LANES(bits_to_float(uint32_t(p[i].bits) << 16)); }
STRETTO_INLINE f32x16 load(const int8_t* p) { STRETTO_LANES(static_cast<float>(p[i])); }
#undef STRETTO_LANES

#endif

STRETTO_INLINE f32x16 zero() { return broadcast(0.f); }
// Round to nearest, ties to even; NaN stays NaN.
#if defined(STRETTO_ISA_avx512)
STRETTO_INLINE void store(bfloat16_t* p, f32x16 a) {
  const __m512i b = _mm512_castps_si512(a.v), high = _mm512_srli_epi32(b, 16);
  const __m512i carry = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(b, carry), 16), nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __m512i out = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded, nan);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
#elif defined(STRETTO_ISA_avx2)
STRETTO_INLINE __m256i bfloat16_bits8(__m256 a) {
  const __m256i b = _mm256_castps_si256(a), high = _mm256_srli_epi32(b, 16);
  const __m256i carry = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(b, carry), 16), nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
STRETTO_INLINE void store(bfloat16_t* p, f32x16 a) {
  const __m256i packed = _mm256_packus_epi32(bfloat16_bits8(a.lo), bfloat16_bits8(a.hi));  // by halves: lo hi lo hi
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
#else
STRETTO_INLINE void store(bfloat16_t* p, f32x16 a) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t b = float_to_bits(a.v[i]);
    p[i].bits =
        (b & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((b >> 16) | 0x40u) : static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
}
#endif

// Sum and maximum over lanes in one fixed tree: 16 -> 8 -> 4 -> 2 -> 1, upper half onto lower.
#if defined(STRETTO_ISA_scalar)
STRETTO_INLINE float reduce_add(f32x16 a) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  return a.v[0];
}
STRETTO_INLINE float reduce_max(f32x16 a) {
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
  return a.v[0];
}
#else
STRETTO_INLINE float reduce_add(f32x16 a) { return sum8(_mm256_add_ps(low_half(a), high_half(a))); }
STRETTO_INLINE float reduce_max(f32x16 a) { return max8(_mm256_max_ps(low_half(a), high_half(a))); }
#endif

// Bit i is set where a[i] >= b[i]; clear where either is NaN.
STRETTO_INLINE uint32_t mask_ge(f32x16 a, f32x16 b) {
#if defined(STRETTO_ISA_avx512)
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ);
#elif defined(STRETTO_ISA_avx2)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ))) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return bits;
#endif
}

// Scalar conversions, for tails and single elements.
STRETTO_INLINE float to_float(float x) { return x; }
STRETTO_INLINE float to_float(bfloat16_t x) { return bits_to_float(uint32_t(x.bits) << 16); }
#if defined(STRETTO_ISA_scalar)
STRETTO_INLINE float to_float(half_t x) { return half_to_float(x.bits); }
STRETTO_INLINE void from_float(half_t& out, float x) { out.bits = float_to_half(x); }
#else
STRETTO_INLINE float to_float(half_t x) { return _cvtsh_ss(x.bits); }
STRETTO_INLINE void from_float(half_t& out, float x) {
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
STRETTO_INLINE void from_float(float& out, float x) { out = x; }
STRETTO_INLINE void from_float(bfloat16_t& out, float x) {
  const uint32_t b = float_to_bits(x);
  out.bits =
      (b & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((b >> 16) | 0x40u) : static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

// First n of 16 elements (the rest zero, not read), any element type.
template <class T> STRETTO_INLINE f32x16 load_some(const T* p, int n) {
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}
template <class T> STRETTO_INLINE void store_some(T* p, f32x16 a, int n) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < n; ++i) from_float(p[i], lanes[i]);
}

// e^x with at most 2 ulps of error. Below -87.33 the result is 0 (a softmax weight that small is nothing); above 88.72 infinity;
// NaN stays NaN. Range reduction x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts; e^r by its Taylor polynomial of degree 6,
// whose remainder there is below 2^-25.
STRETTO_INLINE f32x16 exp(f32x16 x) {
  const f32x16 clamped = min(broadcast(88.3762626647949f), max(broadcast(-87.3365447505531f), x));  // NaN: min and max keep x
  const f32x16 n = round_even(mul(clamped, broadcast(1.44269504088896341f)));
  f32x16 r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  f32x16 p = broadcast(1.f / 720);
  p = fma(p, r, broadcast(1.f / 120));
  p = fma(p, r, broadcast(1.f / 24));
  p = fma(p, r, broadcast(1.f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, mul(r, r), r);
  p = add(p, broadcast(1.f));
  const f32x16 result = mul(p, exp2_integral(n));
#if defined(STRETTO_ISA_avx512)
  const __m512 low = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-87.3365447505531f), _CMP_LT_OQ), result.v, _mm512_setzero_ps());
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(88.3762626647949f), _CMP_GT_OQ), low, _mm512_set1_ps(__builtin_inff()))};
#elif defined(STRETTO_ISA_avx2)
  const __m256 under = _mm256_set1_ps(-87.3365447505531f), over = _mm256_set1_ps(88.3762626647949f), inf = _mm256_set1_ps(__builtin_inff());
  const __m256 lo = _mm256_andnot_ps(_mm256_cmp_ps(x.lo, under, _CMP_LT_OQ), result.lo);
  const __m256 hi = _mm256_andnot_ps(_mm256_cmp_ps(x.hi, under, _CMP_LT_OQ), result.hi);
  return {_mm256_blendv_ps(lo, inf, _mm256_cmp_ps(x.lo, over, _CMP_GT_OQ)), _mm256_blendv_ps(hi, inf, _mm256_cmp_ps(x.hi, over, _CMP_GT_OQ))};
#else
  f32x16 out = result;
  for (int i = 0; i < 16; ++i) {
    if (x.v[i] < -87.3365447505531f) out.v[i] = 0.f;
    if (x.v[i] > 88.3762626647949f) out.v[i] = __builtin_inff();
  }
  return out;
#endif
}

}  // namespace stretto::STRETTO_ISA
