// Reading packed blocks, for the quant family's *_cpu.cpp: 64 bytes at a time on any instruction set, and one policy per format.
#pragma once
#include "common/simd.h"
#include "kernels/quant/formats.h"

namespace stretto::STRETTO_ISA {

// 64 unsigned bytes: row r's quad at byte 4r.
#if defined(STRETTO_ISA_avx512)
struct u8x64 { __m512i v; };
STRETTO_INLINE u8x64 load64(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
STRETTO_INLINE u8x64 low_nibbles(u8x64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
STRETTO_INLINE u8x64 high_nibbles(u8x64 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// a | (b shifted left by kShift, right if negative) & kMask, byte by byte; kMask must not let in bits of a neighbouring byte
template <int kShift, int kMask> STRETTO_INLINE u8x64 insert(u8x64 a, u8x64 b) {
  __m512i s = b.v;
  if constexpr (kShift > 0) s = _mm512_slli_epi16(s, kShift);
  if constexpr (kShift < 0) s = _mm512_srli_epi16(s, -kShift);
  return {_mm512_ternarylogic_epi32(a.v, s, _mm512_set1_epi8(kMask), 0xF8)};  // a | (s & mask)
}
STRETTO_INLINE f32x16 load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
#elif defined(STRETTO_ISA_avx2)
struct u8x64 { __m256i lo, hi; };
STRETTO_INLINE u8x64 load64(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
STRETTO_INLINE u8x64 low_nibbles(u8x64 a) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
STRETTO_INLINE u8x64 high_nibbles(u8x64 a) { return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)}); }
template <int kShift, int kMask> STRETTO_INLINE __m256i insert(__m256i a, __m256i b) {
  if constexpr (kShift > 0) b = _mm256_slli_epi16(b, kShift);
  if constexpr (kShift < 0) b = _mm256_srli_epi16(b, -kShift);
  return _mm256_or_si256(a, _mm256_and_si256(b, _mm256_set1_epi8(kMask)));
}
template <int kShift, int kMask> STRETTO_INLINE u8x64 insert(u8x64 a, u8x64 b) {
  return {insert<kShift, kMask>(a.lo, b.lo), insert<kShift, kMask>(a.hi, b.hi)};
}
STRETTO_INLINE f32x16 load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
#else
struct u8x64 { uint8_t v[64]; };
#define STRETTO_BYTES(expr)                                         \
  u8x64 r;                                                          \
  for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(expr); \
  return r
STRETTO_INLINE u8x64 load64(const uint8_t* p) { STRETTO_BYTES(p[i]); }
STRETTO_INLINE u8x64 low_nibbles(u8x64 a) { STRETTO_BYTES(a.v[i] & 15); }
STRETTO_INLINE u8x64 high_nibbles(u8x64 a) { STRETTO_BYTES(a.v[i] >> 4); }
template <int kShift, int kMask> STRETTO_INLINE u8x64 insert(u8x64 a, u8x64 b) {
  STRETTO_BYTES(a.v[i] | ((kShift >= 0 ? b.v[i] << (kShift < 0 ? 0 : kShift) : b.v[i] >> (kShift < 0 ? -kShift : 0)) & kMask));
}
#undef STRETTO_BYTES
STRETTO_INLINE f32x16 load_u8(const uint8_t* p) {
  f32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return r;
}
#endif
STRETTO_INLINE f32x16 load_halves(const uint8_t* p) { return load(reinterpret_cast<const half_t*>(p)); }
STRETTO_INLINE f32x16 load_i8(const uint8_t* p) { return load(reinterpret_cast<const int8_t*>(p)); }

// Policies. quad<g>(block) gives the values of quad g as unsigned bytes, true value = byte - kOffset; kBits is their width.
// scale / minimum are per block b of a unit; with kHalves the scale is half(unit, 2b + i), an integer, times scale(unit, b).
template <int g> STRETTO_INLINE u8x64 nibble_quad(const uint8_t* block) {
  const u8x64 v = load64(block + 64 * (g & 3));
  if constexpr (g < 4) return low_nibbles(v);
  else return high_nibbles(v);
}
template <int g> STRETTO_INLINE u8x64 five_bit_quad(const uint8_t* block) { return insert<4 - g, 16>(nibble_quad<g>(block), load64(block + 256)); }

struct Legacy {  // one block a unit
  static constexpr int kUnitBlocks = 1;
  static constexpr bool kHalves = false;
  STRETTO_INLINE const uint8_t* block(const uint8_t* unit, int) { return unit; }
};
struct Q8_0 : Legacy {
  static constexpr int kUnitBytes = 544, kOffset = 128, kBits = 8;
  static constexpr bool kMin = false;
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) { return load64(block + 64 * g); }
  STRETTO_INLINE f32x16 scale(const uint8_t* unit, int) { return load_halves(unit + 512); }
};
struct Q4_0 : Legacy {
  static constexpr int kUnitBytes = 288, kOffset = 8, kBits = 4;
  static constexpr bool kMin = false;
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) { return nibble_quad<g>(block); }
  STRETTO_INLINE f32x16 scale(const uint8_t* unit, int) { return load_halves(unit + 256); }
};
struct Q4_1 : Legacy {
  static constexpr int kUnitBytes = 320, kOffset = 0, kBits = 4;
  static constexpr bool kMin = true;
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) { return nibble_quad<g>(block); }
  STRETTO_INLINE f32x16 scale(const uint8_t* unit, int) { return load_halves(unit + 256); }
  STRETTO_INLINE f32x16 minimum(const uint8_t* unit, int) { return load_halves(unit + 288); }
};
struct Q5_0 : Legacy {
  static constexpr int kUnitBytes = 352, kOffset = 16, kBits = 5;
  static constexpr bool kMin = false;
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) { return five_bit_quad<g>(block); }
  STRETTO_INLINE f32x16 scale(const uint8_t* unit, int) { return load_halves(unit + 320); }
};
struct Q5_1 : Legacy {
  static constexpr int kUnitBytes = 384, kOffset = 0, kBits = 5;
  static constexpr bool kMin = true;
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) { return five_bit_quad<g>(block); }
  STRETTO_INLINE f32x16 scale(const uint8_t* unit, int) { return load_halves(unit + 320); }
  STRETTO_INLINE f32x16 minimum(const uint8_t* unit, int) { return load_halves(unit + 352); }
};
template <int kBlockBytes> struct MinimumK {  // Q4_K, Q5_K: eight blocks a unit
  static constexpr int kUnitBlocks = 8, kUnitBytes = 320 + 8 * kBlockBytes, kOffset = 0;
  static constexpr bool kMin = true, kHalves = false;
  STRETTO_INLINE const uint8_t* block(const uint8_t* unit, int b) { return unit + 320 + kBlockBytes * b; }
  STRETTO_INLINE f32x16 scale(const uint8_t* unit, int b) { return mul(load_halves(unit), load_u8(unit + 64 + 32 * b)); }  // exact: 11 + 6 bits
  STRETTO_INLINE f32x16 minimum(const uint8_t* unit, int b) { return sub(zero(), mul(load_halves(unit + 32), load_u8(unit + 80 + 32 * b))); }
};
struct Q4_K : MinimumK<256> {
  static constexpr int kBits = 4;
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) { return nibble_quad<g>(block); }
};
struct Q5_K : MinimumK<320> {
  static constexpr int kBits = 5;
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) { return five_bit_quad<g>(block); }
};
struct Q6_K {
  static constexpr int kUnitBlocks = 8, kUnitBytes = 3360, kOffset = 32, kBits = 6;
  static constexpr bool kMin = false, kHalves = true;
  STRETTO_INLINE const uint8_t* block(const uint8_t* unit, int b) { return unit + 288 + 384 * b; }
  template <int g> STRETTO_INLINE u8x64 quad(const uint8_t* block) {
    return insert<4 - 2 * (g & 3), 48>(nibble_quad<g>(block), load64(block + 256 + 64 * (g / 4)));
  }
  STRETTO_INLINE f32x16 scale(const uint8_t* unit, int) { return load_halves(unit); }
  STRETTO_INLINE f32x16 half(const uint8_t* unit, int i) { return load_i8(unit + 32 + 16 * i); }
};

}  // namespace stretto::STRETTO_ISA
