// The micro-kernel for quantised weights: 16 outputs x R rows over the whole of k, the same formula and order for every R.
#pragma once
#include "kernels/quant/quantize_rows.h"
#include "kernels/quant/unpack.h"

namespace stretto::STRETTO_ISA {

template <int kValue> struct Index { static constexpr int value = kValue; };
template <int kFirst, int kLast, class Fn> STRETTO_INLINE void unroll(const Fn& fn) {
  if constexpr (kFirst < kLast) {
    fn(Index<kFirst>{});
    unroll<kFirst + 1, kLast>(fn);
  }
}
STRETTO_INLINE int32_t get_i32(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
STRETTO_INLINE float get_f32(const uint8_t* p) {
  float v;
  std::memcpy(&v, p, 4);
  return v;
}
#define STRETTO_LAMBDA __attribute__((always_inline))

// dots[r] = float(sum over quads [kFirst, kLast) of (byte - kOffset) * q_x). x: q[R][32]; bias: R int32, -kOffset * sum of q_x.
#if defined(STRETTO_ISA_avx512)

template <class F, int R, int kFirst, int kLast>
STRETTO_INLINE void block_dots(const uint8_t* block, const uint8_t* x, const uint8_t* bias, f32x16* dots) {
  __m512i sums[R];
  for (int r = 0; r < R; ++r) {
    if constexpr (F::kOffset != 0) sums[r] = _mm512_set1_epi32(get_i32(bias + 4 * r));
    else sums[r] = _mm512_setzero_si512();
  }
  unroll<kFirst, kLast>([&](auto g) STRETTO_LAMBDA {
    const __m512i w = F::template quad<g.value>(block).v;
    for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], w, _mm512_set1_epi32(get_i32(x + 32 * r + 4 * g.value)));
  });
  for (int r = 0; r < R; ++r) dots[r] = {_mm512_cvtepi32_ps(sums[r])};
}

#elif defined(STRETTO_ISA_avx2)

// maddubs adds two products u8 * s8 into 16 bits: with values below 2^kBits, 2^(7 - kBits) such sums fit (15 * 127 * 2 * 8 = 30480,
// 31 * 127 * 2 * 4 = 31496, 63 * 127 * 2 * 2 = 32004) before they must be widened. Eight bits fit only as |w| * (x with w's sign):
// 127 * 127 * 2 = 32258; the file's q is never -128, and if a hostile one is, 128 * 127 * 2 = 32512 still fits.
template <class F, int R, int kFirst, int kLast>
STRETTO_INLINE void block_dots(const uint8_t* block, const uint8_t* x, const uint8_t* bias, f32x16* dots) {
  constexpr int kRun = F::kBits == 8 ? 1 : 1 << (7 - F::kBits), kRows = R < 4 ? R : 4;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r0 = 0; r0 < R; r0 += kRows) {
    __m256i lo[kRows], hi[kRows], lo16[kRows], hi16[kRows];
    for (int r = 0; r < kRows; ++r) {
      lo[r] = F::kOffset != 0 && F::kBits < 8 ? _mm256_set1_epi32(get_i32(bias + 4 * (r0 + r))) : _mm256_setzero_si256();
      hi[r] = lo[r];
    }
    unroll<kFirst, kLast>([&](auto g) STRETTO_LAMBDA {
      const u8x64 w = F::template quad<g.value>(block);
      for (int r = 0; r < kRows; ++r) {
        const __m256i q = _mm256_set1_epi32(get_i32(x + 32 * (r0 + r) + 4 * g.value));
        __m256i a, b;
        if constexpr (F::kBits == 8) {
          const __m256i flip = _mm256_set1_epi8(-128), wl = _mm256_xor_si256(w.lo, flip), wh = _mm256_xor_si256(w.hi, flip);
          a = _mm256_maddubs_epi16(_mm256_abs_epi8(wl), _mm256_sign_epi8(q, wl));
          b = _mm256_maddubs_epi16(_mm256_abs_epi8(wh), _mm256_sign_epi8(q, wh));
        } else {
          a = _mm256_maddubs_epi16(w.lo, q);
          b = _mm256_maddubs_epi16(w.hi, q);
        }
        constexpr int step = (g.value - kFirst) % kRun;
        lo16[r] = step == 0 ? a : _mm256_add_epi16(lo16[r], a);
        hi16[r] = step == 0 ? b : _mm256_add_epi16(hi16[r], b);
        if constexpr (step == kRun - 1 || g.value == kLast - 1) {
          lo[r] = _mm256_add_epi32(lo[r], _mm256_madd_epi16(lo16[r], ones));
          hi[r] = _mm256_add_epi32(hi[r], _mm256_madd_epi16(hi16[r], ones));
        }
      }
    });
    for (int r = 0; r < kRows; ++r) dots[r0 + r] = {_mm256_cvtepi32_ps(lo[r]), _mm256_cvtepi32_ps(hi[r])};
  }
}

#else

template <class F, int R, int kFirst, int kLast>
STRETTO_INLINE void block_dots(const uint8_t* block, const uint8_t* x, const uint8_t* bias, f32x16* dots) {
  int32_t sums[R][16];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 16; ++i) sums[r][i] = F::kOffset != 0 ? get_i32(bias + 4 * r) : 0;
  unroll<kFirst, kLast>([&](auto g) STRETTO_LAMBDA {
    const u8x64 w = F::template quad<g.value>(block);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) sums[r][i] += w.v[4 * i + j] * reinterpret_cast<const int8_t*>(x)[32 * r + 4 * g.value + j];
  });
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 16; ++i) dots[r].v[i] = static_cast<float>(sums[r][i]);
}

#endif

// sums[r][16] for the group at `panel`; x is a tile of R rows.
template <class F, int R> static void int8_tile(const uint8_t* panel, int64_t blocks, const uint8_t* x, float* sums) {
  f32x16 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = zero();
  for (int64_t u = 0; u < blocks; u += F::kUnitBlocks, panel += F::kUnitBytes) {
    for (int b = 0; b < F::kUnitBlocks; ++b, x += kXBlockBytes<F> * R) {
      const uint8_t *block = F::block(panel, b), *dx = x + 32 * R, *slot = dx + 4 * R;
      f32x16 dots[R];
      if constexpr (F::kHalves) {  // |sc| * 16 * 127 * 32 < 2^24 for each half: both products and their sum are exact
        f32x16 second[R];
        block_dots<F, R, 0, 4>(block, x, slot, dots);
        block_dots<F, R, 4, 8>(block, x, slot + 4 * R, second);
        const f32x16 sc0 = F::half(panel, 2 * b), sc1 = F::half(panel, 2 * b + 1);
        for (int r = 0; r < R; ++r) dots[r] = fma(second[r], sc1, mul(dots[r], sc0));
      } else {
        block_dots<F, R, 0, 8>(block, x, slot, dots);
      }
      const f32x16 d = F::scale(panel, b);
      for (int r = 0; r < R; ++r) acc[r] = fma(mul(dots[r], d), broadcast(get_f32(dx + 4 * r)), acc[r]);
      if constexpr (F::kMin) {
        const f32x16 m = F::minimum(panel, b);
        for (int r = 0; r < R; ++r) acc[r] = fma(m, broadcast(get_f32(slot + 4 * r)), acc[r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) store(sums + 16 * r, acc[r]);
}

}  // namespace stretto::STRETTO_ISA
