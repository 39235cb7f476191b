#include "kernels/quant/linear.h"

#include "common/parallel.h"
#include "kernels/quant/tile_float.h"
#include "kernels/quant/tile_int8.h"

namespace stretto::STRETTO_ISA {

// Rows are taken in tiles of 8; what is left over takes the smallest of 1, 2, 4, 8 that holds it.
constexpr int kTileRows = 8;
// Rows of a block of tiles: their int8 form (128 * 1.25 bytes * k) stays in the second-level cache while weights stream past.
constexpr int64_t kBlockRows = 128;

static int tile_rows(int64_t left) { return left >= 5 ? 8 : left >= 3 ? 4 : static_cast<int>(left); }

// act(gate) * up, both as x * sigmoid-like quotients: e^-x overflows to infinity and gives 0, as it should.
STRETTO_INLINE f32x16 gated(Gate gate, f32x16 g, f32x16 up) {
  f32x16 u = g;
  if (gate == Gate::gelu_tanh) {  // 0.5 (1 + tanh(u)) = 1 / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3)
    u = mul(broadcast(1.5957691216057308f), fma(mul(mul(g, g), g), broadcast(0.044715f), g));
  }
  return mul(div(g, add(broadcast(1.f), exp(sub(zero(), u)))), up);
}

// Writes `count` rows from `row` on. sums: [1 or, with a gate, 2][R][16] of group `group`.
static void finish(const LinearParams& p, int64_t group, int64_t row, int64_t count, int R, const float* sums) {
  const bool has_gate = p.gate != Gate::none;
  const int64_t columns = has_gate ? p.n / 2 : p.n, column = 16 * (has_gate ? group / 2 : group);
  const int width = static_cast<int>(columns - column < 16 ? columns - column : 16);
  const int first_width = static_cast<int>(p.n - 16 * group < 16 ? p.n - 16 * group : 16);
  for (int64_t r = 0; r < count; ++r) {
    f32x16 v = load(sums + 16 * r);
    if (p.bias) v = add(v, load_first(p.bias + 16 * group, first_width));
    if (has_gate) {
      f32x16 up = load(sums + 16 * (R + r));
      if (p.bias) up = add(up, load_first(p.bias + 16 * (group + 1), 16));
      v = gated(p.gate, v, up);
    }
    if (p.residual) v = add(v, load_first(p.residual + (row + r) * p.residual_stride + column, width));
    float* out = p.out + (row + r) * p.out_stride + column;
    if (width == 16) store(out, v);
    else store_first(out, v, width);
  }
}

// Splits rows and groups into tasks and runs tile(group, groups, first row, R, sums) on each tile of each.
template <int kStep, class Tile> static void for_tiles(const LinearParams& p, int64_t rows, const Tile& tile) {
  const int64_t groups = (p.n + 15) / 16, step = p.gate != Gate::none && kStep < 2 ? 2 : kStep;
  const int64_t block_rows = rows < kBlockRows ? rows : kBlockRows, row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  // A task is at least 12 KB of weights (about 1 us of reading) and 2 M multiply-adds (10 us or more): well above the hand-over.
  const int64_t bytes = group_bytes(p.format, p.k), work = block_rows * p.k * 16;
  int64_t chunk = (12288 + bytes - 1) / bytes;
  if (rows > kTileRows && chunk < (1 << 21) / work) chunk = (1 << 21) / work;
  chunk = (chunk + step - 1) / step * step;
  const int64_t chunks = (groups + chunk - 1) / chunk;
  parallel_for(0, row_blocks * chunks, 1, [&](int64_t task) {
    const int64_t first_row = task / chunks * kBlockRows, last_row = first_row + kBlockRows < rows ? first_row + kBlockRows : rows;
    const int64_t first = task % chunks * chunk, last = first + chunk < groups ? first + chunk : groups;
    alignas(64) float sums[4 * kTileRows * 16];
    for (int64_t g = first; g < last; g += step) {
      const int64_t count = last - g < step ? last - g : step;
      for (int64_t row = first_row; row < last_row; row += kTileRows) {
        const int64_t left = last_row - row < kTileRows ? last_row - row : kTileRows;
        const int R = tile_rows(left);
        tile(g, count, row, left, R, sums);
        const int64_t each = p.gate != Gate::none ? 2 : 1;
        for (int64_t i = 0; i < count; i += each) finish(p, g + i, row, left, R, sums + 16 * R * i);
      }
    }
  });
}

template <class F> static void linear_int8(const LinearParams& p, int64_t rows) {
  const int64_t blocks = p.k / 32, row_bytes = blocks * kXBlockBytes<F>, bytes = group_bytes(p.format, p.k);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  uint8_t* x = static_cast<uint8_t*>(thread_scratch(2, tiles * kTileRows * row_bytes));
  auto quantize = [&](int64_t t) {
    const int64_t row = t * kTileRows, left = rows - row;
    quantize_tile<F>(p.x, p.x_stride, row, rows, left < kTileRows ? tile_rows(left) : kTileRows, blocks, x + row * row_bytes);
  };
  parallel_for(0, tiles, 1, quantize);
  for_tiles<1>(p, rows, [&](int64_t group, int64_t count, int64_t row, int64_t, int R, float* sums) {
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t *panel = p.packed + (group + i) * bytes, *tile = x + row * row_bytes;
      float* out = sums + 16 * R * i;
      if (R == 8) int8_tile<F, 8>(panel, blocks, tile, out);
      else if (R == 4) int8_tile<F, 4>(panel, blocks, tile, out);
      else if (R == 2) int8_tile<F, 2>(panel, blocks, tile, out);
      else int8_tile<F, 1>(panel, blocks, tile, out);
    }
  });
}

// count groups x R rows, by the largest micro-kernel whose sums fit the registers: 16 vectors of 16 lanes, or 4 on the 16 short ones of avx2.
template <class T, int R> static void float_tiles(const T* panel, int64_t count, const LinearParams& p, const float* x, int64_t rows, float* sums) {
#if defined(STRETTO_ISA_avx512)
  constexpr int kRows = R, kGroups = R == 8 ? 2 : 4;
#else
  constexpr int kRows = R < 4 ? R : 4, kGroups = 4 / kRows;
#endif
  for (int64_t i = 0; i < count; i += kGroups) {
    for (int r = 0; r < R && r < rows; r += kRows) {
      const float* xr = x + r * p.x_stride;
      float* out = sums + 16 * (R * i + r);
      const T* w = panel + 16 * p.k * i;
      if (count - i >= kGroups) float_tile<T, kRows, kGroups>(w, p.k, xr, p.x_stride, rows - r, out, 16 * R);
      else
        for (int64_t j = 0; j < count - i; ++j) float_tile<T, kRows, 1>(w + 16 * p.k * j, p.k, xr, p.x_stride, rows - r, out + 16 * R * j, 16 * R);
    }
  }
}

template <class T> static void linear_float(const LinearParams& p, int64_t rows) {
  for_tiles<4>(p, rows, [&](int64_t group, int64_t count, int64_t row, int64_t left, int R, float* sums) {
    const T* panel = reinterpret_cast<const T*>(p.packed) + group * p.k * 16;
    const float* x = p.x + row * p.x_stride;
    if (R == 8) float_tiles<T, 8>(panel, count, p, x, left, sums);
    else if (R == 4) float_tiles<T, 4>(panel, count, p, x, left, sums);
    else if (R == 2) float_tiles<T, 2>(panel, count, p, x, left, sums);
    else float_tiles<T, 1>(panel, count, p, x, left, sums);
  });
}

void linear(const LinearParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  if (rows <= 0 || p.n == 0) return;
  switch (p.format) {
    case WeightFormat::f32: return linear_float<float>(p, rows);
    case WeightFormat::f16: return linear_float<half_t>(p, rows);
    case WeightFormat::bf16: return linear_float<bfloat16_t>(p, rows);
    case WeightFormat::q8_0: return linear_int8<Q8_0>(p, rows);
    case WeightFormat::q4_0: return linear_int8<Q4_0>(p, rows);
    case WeightFormat::q4_1: return linear_int8<Q4_1>(p, rows);
    case WeightFormat::q5_0: return linear_int8<Q5_0>(p, rows);
    case WeightFormat::q5_1: return linear_int8<Q5_1>(p, rows);
    case WeightFormat::q4_k: return linear_int8<Q4_K>(p, rows);
    case WeightFormat::q5_k: return linear_int8<Q5_K>(p, rows);
    case WeightFormat::q6_k: return linear_int8<Q6_K>(p, rows);
  }
}

}  // namespace stretto::STRETTO_ISA
