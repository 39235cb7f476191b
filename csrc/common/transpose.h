// Sixteen rows of sixteen elements, as floats, turned on their side. For *_cpu.cpp only.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

#if defined(STRETTO_ISA_avx512)
STRETTO_INLINE void transpose(f32x16 (&r)[kLanes]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {  // b[i + c]: column 4 q + c of rows i .. i + 3, in quarter q
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int c = 0; c < 4; ++c) {
    const __m512 even03 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0x88), odd03 = _mm512_shuffle_f32x4(b[c], b[c + 4], 0xdd);
    const __m512 even47 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0x88), odd47 = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(even03, even47, 0x88), r[c + 8].v = _mm512_shuffle_f32x4(even03, even47, 0xdd);
    r[c + 4].v = _mm512_shuffle_f32x4(odd03, odd47, 0x88), r[c + 12].v = _mm512_shuffle_f32x4(odd03, odd47, 0xdd);
  }
}
#elif defined(STRETTO_ISA_avx2)
STRETTO_INLINE void transpose8(__m256 (&r)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x20);
    r[c + 4] = _mm256_permute2f128_ps(b[c], b[c + 4], 0x31);
  }
}
STRETTO_INLINE void transpose(f32x16 (&r)[kLanes]) {
  __m256 corner[4][8];  // [rows 8 i .. 8 i + 7 of half j]
  for (int i = 0; i < 8; ++i) corner[0][i] = r[i].lo, corner[1][i] = r[i].hi, corner[2][i] = r[i + 8].lo, corner[3][i] = r[i + 8].hi;
  for (auto& c : corner) transpose8(c);
  for (int i = 0; i < 8; ++i) r[i] = {corner[0][i], corner[2][i]}, r[i + 8] = {corner[1][i], corner[3][i]};
}
#else
STRETTO_INLINE void transpose(f32x16 (&r)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = r[i].v[j];
      r[i].v[j] = r[j].v[i], r[j].v[i] = x;
    }
}
#endif

// to[d * stride + lane] = rows[lane][d] for d in [0, width)
template <class T> STRETTO_INLINE void transpose_rows(const T* const* rows, int64_t width, float* to, int64_t stride) {
  f32x16 r[kLanes];
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    for (int i = 0; i < kLanes; ++i) r[i] = load(rows[i] + d);
    transpose(r);
    for (int i = 0; i < kLanes; ++i) store(to + (d + i) * stride, r[i]);
  }
  if (d == width) return;
  for (int i = 0; i < kLanes; ++i) r[i] = load_some(rows[i] + d, static_cast<int>(width - d));
  transpose(r);
  for (int i = 0; i < width - d; ++i) store(to + (d + i) * stride, r[i]);
}

}  // namespace stretto::STRETTO_ISA
