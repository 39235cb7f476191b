// Activations to int8, for the quant family's *_cpu.cpp.
//
// A tile is R rows; for each block of 32 along k it holds q[R][32] int8, d[R] float, and slots[kSlots][R] of four bytes: with a
// minimum d * sum(q) as float, else -offset * sum(q) as int32 (of each half block where scales are per half). All that a
// micro-kernel broadcasts for a block is in one place, whatever the row stride of x was.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

template <class F> inline constexpr int kSlots = F::kHalves ? 2 : 1;
template <class F> inline constexpr int kXBlockBytes = 36 + 4 * kSlots<F>;  // of one row

STRETTO_INLINE f32x16 abs16(f32x16 a) { return max(a, sub(zero(), a)); }

// a holds integers in [-127, 127]
STRETTO_INLINE void store_i8(int8_t* p, f32x16 a) {
#if defined(STRETTO_ISA_avx512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
#elif defined(STRETTO_ISA_avx2)
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));  // 64-bit pieces: lo0 hi0 lo1 hi1
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
#else
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
#endif
}

STRETTO_INLINE void put_i32(uint8_t* p, int32_t v) { std::memcpy(p, &v, 4); }
STRETTO_INLINE void put_f32(uint8_t* p, float v) { std::memcpy(p, &v, 4); }

// One block of row r of a tile of R. Not finite: q = 0 and d = NaN, so that every output of the row becomes NaN and no cast is undefined.
template <class F> STRETTO_INLINE void quantize_block(const float* x, uint8_t* out, int r, int R) {
  const f32x16 a = load(x), b = load(x + 16);
  const float largest = reduce_max(max(abs16(a), abs16(b)));
  const float poison = reduce_add(add(mul(a, zero()), mul(b, zero())));  // 0, or NaN if any is not finite
  float d = largest / 127.f, inverse = 127.f / largest;
  if (poison != poison || !(largest >= 0x1p-120f)) {
    d = poison != poison ? poison : 0.f;
    inverse = 0.f;
  }
  const f32x16 scale = broadcast(inverse);
  f32x16 qa = zero(), qb = zero();
  if (inverse != 0.f) qa = round_even(mul(a, scale)), qb = round_even(mul(b, scale));
  int8_t* q = reinterpret_cast<int8_t*>(out) + 32 * r;
  store_i8(q, qa);
  store_i8(q + 16, qb);
  uint8_t* tail = out + 32 * R + 4 * r;
  put_f32(tail, d);
  tail += 4 * R;
  if constexpr (F::kHalves) {
    put_i32(tail, -F::kOffset * static_cast<int32_t>(reduce_add(qa)));
    put_i32(tail + 4 * R, -F::kOffset * static_cast<int32_t>(reduce_add(qb)));
  } else {
    const float sum = reduce_add(add(qa, qb));  // integers below 2^24: exact in any order
    if constexpr (F::kMin) put_f32(tail, d * sum);
    else put_i32(tail, -F::kOffset * static_cast<int32_t>(sum));
  }
}

// Rows first .. first + R of x into a tile; rows from `rows` on become zeros.
template <class F> static void quantize_tile(const float* x, int64_t x_stride, int64_t first, int64_t rows, int R, int64_t blocks, uint8_t* tile) {
  const int64_t block_bytes = int64_t{kXBlockBytes<F>} * R;
  for (int r = 0; r < R; ++r) {
    if (first + r < rows) {
      const float* row = x + (first + r) * x_stride;
      for (int64_t b = 0; b < blocks; ++b) quantize_block<F>(row + 32 * b, tile + b * block_bytes, r, R);
    } else {
      for (int64_t b = 0; b < blocks; ++b) {
        uint8_t* out = tile + b * block_bytes;
        std::memset(out + 32 * r, 0, 32);
        for (int slot = 0; slot <= kSlots<F>; ++slot) put_i32(out + 32 * R + 4 * (slot * R + r), 0);
      }
    }
  }
}

}  // namespace stretto::STRETTO_ISA
