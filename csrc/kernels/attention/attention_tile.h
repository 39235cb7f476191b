// Register tiles of attention: scores of R queries against vectors of 16 keys, and weighted sums of values for R rows.
// Every accumulator is one chain of fused multiply-adds, over d for a score and over keys for an output, so the shape of the tile
// never changes a bit. For *_cpu.cpp only.
#pragma once
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

inline constexpr int kTileRows = 6;     // with four vectors 24 of 32 registers on AVX-512; with one (two halves) 12 of 16 on AVX2
inline constexpr int kSplit = 256;      // keys; part of the arithmetic (see paged_attention.h)
inline constexpr int kRowStride = 272;  // floats between rows of scores: a split, or 256 tree nodes from any offset in a vector
inline constexpr int kChunk = 64;       // keys handled by all rows of a block while they are in L1

// Vectors of 16 lanes beside R rows that keep enough chains in flight without spilling.
constexpr int tile_vectors(int rows) {
#if defined(STRETTO_ISA_avx512)
  return rows <= kTileRows ? 4 : 1;
#else
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
#endif
}

STRETTO_INLINE float to_float(int8_t x) { return static_cast<float>(x); }

// scores[r * kRowStride + 16 v + lane] = sum over d of q[d * R + r] * keys[v][d * stride + lane]
template <int R, int V, class T> STRETTO_INLINE void score_vectors(const float* q, const T* const* keys, int64_t stride, int64_t head_dim,
                                                                   float* scores) {
  f32x16 acc[R][V];
  const T* k[V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int v = 0; v < V; ++v) k[v] = keys[v];
  int64_t offset = 0;
  for (int64_t d = 0; d < head_dim; ++d, offset += stride, q += R) {
    f32x16 key[V];
    for (int v = 0; v < V; ++v) key[v] = load(k[v] + offset);
    for (int r = 0; r < R; ++r) {
      const f32x16 x = broadcast(q[r]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(x, key[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(scores + r * kRowStride + v * kLanes, acc[r][v]);
}

template <int R, class T> static void score_rows(const float* q, const T* const* keys, int64_t stride, int64_t head_dim, int vectors, float* scores) {
  constexpr int kV = tile_vectors(R);
  int v = 0;
  for (; v + kV <= vectors; v += kV) score_vectors<R, kV, T>(q, keys + v, stride, head_dim, scores + v * kLanes);
  if constexpr (kV > 2)
    for (; v + 2 <= vectors; v += 2) score_vectors<R, 2, T>(q, keys + v, stride, head_dim, scores + v * kLanes);
  if constexpr (kV > 1)
    for (; v < vectors; ++v) score_vectors<R, 1, T>(q, keys + v, stride, head_dim, scores + v * kLanes);
}

// acc[r * head_dim + i] += sum over j in [begin, end), in order, of weights[r * kRowStride + j] * values[j][i], for V vectors of i
template <int R, int V, class T>
STRETTO_INLINE void value_vectors(const float* weights, const T* const* values, int begin, int end, int64_t column, int64_t head_dim, float* acc) {
  f32x16 a[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) a[r][v] = load(acc + r * head_dim + column + v * kLanes);
  for (int j = begin; j < end; ++j) {
    const T* row = values[j] + column;
    f32x16 value[V];
    for (int v = 0; v < V; ++v) value[v] = load(row + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const f32x16 w = broadcast(weights[r * kRowStride + j]);
      for (int v = 0; v < V; ++v) a[r][v] = fma(w, value[v], a[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(acc + r * head_dim + column + v * kLanes, a[r][v]);
}

template <int R, class T> static void value_rows(const float* weights, const T* const* values, int begin, int end, int64_t head_dim, float* acc) {
  constexpr int kV = tile_vectors(R);
  int64_t i = 0;
  for (; i + kV * kLanes <= head_dim; i += kV * kLanes) value_vectors<R, kV, T>(weights, values, begin, end, i, head_dim, acc);
  if constexpr (kV > 2)
    for (; i + 2 * kLanes <= head_dim; i += 2 * kLanes) value_vectors<R, 2, T>(weights, values, begin, end, i, head_dim, acc);
  if constexpr (kV > 1)
    for (; i < head_dim; i += kLanes) value_vectors<R, 1, T>(weights, values, begin, end, i, head_dim, acc);
}

template <class T> static void score_tile(int rows, const float* q, const T* const* keys, int64_t stride, int64_t head_dim, int vectors,
                                          float* scores) {
  switch (rows) {
    case 1: return score_rows<1, T>(q, keys, stride, head_dim, vectors, scores);
    case 2: return score_rows<2, T>(q, keys, stride, head_dim, vectors, scores);
    case 3: return score_rows<3, T>(q, keys, stride, head_dim, vectors, scores);
    case 4: return score_rows<4, T>(q, keys, stride, head_dim, vectors, scores);
    case 5: return score_rows<5, T>(q, keys, stride, head_dim, vectors, scores);
    default: return score_rows<6, T>(q, keys, stride, head_dim, vectors, scores);
  }
}

template <class T> static void value_tile(int rows, const float* weights, const T* const* values, int begin, int end, int64_t head_dim, float* acc) {
  if (begin >= end) return;
  switch (rows) {
    case 1: return value_rows<1, T>(weights, values, begin, end, head_dim, acc);
    case 2: return value_rows<2, T>(weights, values, begin, end, head_dim, acc);
    case 3: return value_rows<3, T>(weights, values, begin, end, head_dim, acc);
    case 4: return value_rows<4, T>(weights, values, begin, end, head_dim, acc);
    case 5: return value_rows<5, T>(weights, values, begin, end, head_dim, acc);
    default: return value_rows<6, T>(weights, values, begin, end, head_dim, acc);
  }
}

}  // namespace stretto::STRETTO_ISA
