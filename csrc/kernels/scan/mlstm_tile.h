// The micro-kernel of mlstm: a tile of C in registers while a block of tokens passes by.
//   for each token t:  tile = a[t] tile + bk[t] v[t]^T;  h[t] += q[t]^T tile
// Rows of the tile are taken in order, so h is one chain over dk whatever the tile's height, which differs by instruction set.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

// 16 of 32 registers hold the tile with AVX-512, 8 of 16 with AVX2; two broadcasts and the lines of v and h need the rest.
#if defined(STRETTO_ISA_avx512)
inline constexpr int kTileRows = 8, kTileVecs = 2;
#else
inline constexpr int kTileRows = 4, kTileVecs = 1;
#endif
inline constexpr int kTileCols = kTileVecs * kLanes;

// What passes by. Packed so that a tile reads consecutive memory: keys and queries [dk / 16][tokens][16], v and h
// [columns / kTileCols][tokens][kTileCols].
struct TilePass {
  const float *bk, *q;  // at the tile's first row
  const float* v;
  float* h;
  const float* a;
  int64_t tokens;
};

// kRead: h is wanted. `write` stores the tile back.
template <int R, bool kRead> static void tile_pass(float* c, int64_t c_stride, bool write, const TilePass& p) {
  f32x16 s[R][kTileVecs];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int x = 0; x < kTileVecs; ++x) s[r][x] = load(c + r * c_stride + x * kLanes);
  for (int64_t t = 0; t < p.tokens; ++t) {
    if (const float a_t = p.a[t]; a_t != 1.f) {  // a new record; 1 * C would change nothing
      const f32x16 a = broadcast(a_t);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int x = 0; x < kTileVecs; ++x) s[r][x] = mul(a, s[r][x]);
    }
    f32x16 v[kTileVecs], h[kTileVecs];
#pragma GCC unroll 2
    for (int x = 0; x < kTileVecs; ++x) {
      v[x] = load(p.v + t * kTileCols + x * kLanes);
      if constexpr (kRead) h[x] = load(p.h + t * kTileCols + x * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const f32x16 bk = broadcast(p.bk[t * kLanes + r]);
#pragma GCC unroll 2
      for (int x = 0; x < kTileVecs; ++x) s[r][x] = fma(bk, v[x], s[r][x]);
      if constexpr (kRead) {
        const f32x16 q = broadcast(p.q[t * kLanes + r]);
#pragma GCC unroll 2
        for (int x = 0; x < kTileVecs; ++x) h[x] = fma(q, s[r][x], h[x]);
      }
    }
    if constexpr (kRead) {
#pragma GCC unroll 2
      for (int x = 0; x < kTileVecs; ++x) store(p.h + t * kTileCols + x * kLanes, h[x]);
    }
  }
  if (write) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int x = 0; x < kTileVecs; ++x) store(c + r * c_stride + x * kLanes, s[r][x]);
  }
}

// The same for the last tile of a row of C, where only `cols` columns exist: it works on a copy.
template <int R, bool kRead> static void edge_pass(float* c, int64_t c_stride, int64_t cols, bool write, const TilePass& p) {
  float copy[R * kTileCols] = {};
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < cols; ++j) copy[r * kTileCols + j] = c[r * c_stride + j];
  tile_pass<R, kRead>(copy, kTileCols, write, p);
  if (!write) return;
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < cols; ++j) c[r * c_stride + j] = copy[r * kTileCols + j];
}

}  // namespace stretto::STRETTO_ISA
