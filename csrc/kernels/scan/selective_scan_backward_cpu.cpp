#include "common/parallel.h"
#include "kernels/scan/scan_backward.h"
#include "kernels/scan/selective_scan_tile.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr int64_t kRows = 32;  // of a tile: its states and factors, 64 KB at 16 states, stay in L2

// Gradients with respect to h of one block, and sums over rows.
struct BlockGrads {
  ScanBlock block;
  float *h, *g, *da;  // [states][16]: state of the forward pass, gradient of the state, gradient of A
  f32x16 dd, dbias;
};

struct Part {             // working memory of a task: some blocks of a group
  int64_t states, size;   // size: floats of a state, 16 * states
  float *b, *c;           // [kRows][states]
  float *after, *factor;  // [kRows + 1][states][16], [kRows][states][16]
  float *db, *dc;         // [kRows][states][16]: summed over the blocks in lanes
  float* kept;            // [tiles][blocks][states][16]: states before each tile
  BlockGrads* grads;      // [blocks]
  ScanTile tile;
};

// The states of a tile's rows, their factors and the sums of C h.
void forward_tile(Part& w, const float* h, const float* a, int64_t count, bool in_range) {
  std::memcpy(w.after, h, static_cast<size_t>(w.size) * 4);
  for (int64_t i = 0; i < count; ++i) {
    const f32x16 delta = load(w.tile.delta + i * kLanes), du = load(w.tile.du + i * kLanes);
    const float* before = w.after + i * w.size;
    f32x16 sum = zero();
    for (int64_t n = 0; n < w.states; ++n) {
      const f32x16 rate = load(a + n * kLanes), factor = in_range ? decay_in_range(delta, rate) : decay(delta, rate);
      const f32x16 state = fma(factor, load(before + n * kLanes), mul(du, broadcast(w.b[i * w.states + n])));
      store(w.factor + i * w.size + n * kLanes, factor);
      store(w.after + (i + 1) * w.size + n * kLanes, state);
      sum = fma(broadcast(w.c[i * w.states + n]), state, sum);
    }
    store(w.tile.y + i * kLanes, sum);
  }
}

// One row, last first: g holds the gradient of the state after it from all later rows. Returns the gradients of delta u and of delta's factor.
STRETTO_INLINE void reverse_row(Part& w, BlockGrads& k, int64_t i, f32x16 gy, f32x16& dproduct, f32x16& dfactor) {
  const f32x16 delta = load(w.tile.delta + i * kLanes), du = load(w.tile.du + i * kLanes);
  const float *before = w.after + i * w.size, *after = before + w.size, *factor = w.factor + i * w.size;
  float *db = w.db + i * w.size, *dc = w.dc + i * w.size;
  dproduct = dfactor = zero();
  for (int64_t n = 0; n < w.states; ++n) {
    const int64_t at = n * kLanes;
    const f32x16 g = fma(broadcast(w.c[i * w.states + n]), gy, load(k.g + at)), a = load(factor + at);
    store(dc + at, fma(gy, load(after + at), load(dc + at)));
    store(db + at, fma(g, du, load(db + at)));
    dproduct = fma(g, broadcast(w.b[i * w.states + n]), dproduct);
    const f32x16 ga = mul(a, g), rate = mul(ga, load(before + at));
    dfactor = fma(rate, load(k.block.a + at), dfactor);
    store(k.da + at, fma(rate, delta, load(k.da + at)));
    store(k.g + at, ga);
  }
}

template <class T> void reverse_tile(const SelectiveScanBackwardParams& p, Part& w, BlockGrads& k, int64_t first, int64_t count) {
  const SelectiveScanInputs& in = p.in;
  const int64_t c0 = k.block.first;
  const int lanes = k.block.lanes;
  const f32x16 one = broadcast(1.f), ln2 = broadcast(0.693147180559945f), d = in.d ? load_n(in.d + c0, lanes) : zero();
  const f32x16 bias = in.dt_bias ? load_n(in.dt_bias + c0, lanes) : zero();
  for (int64_t i = count - 1; i >= 0; --i) {
    const int64_t t = first + i, out = t * in.channels + c0;
    const f32x16 u = load_n(static_cast<const T*>(in.u) + t * in.u_stride + c0, lanes);
    f32x16 gy = load_n(static_cast<const T*>(p.dy) + t * p.dy_stride + c0, lanes);
    if (in.z) {
      const f32x16 z = load_n(static_cast<const T*>(in.z) + t * in.z_stride + c0, lanes), gate = sigmoid(z);
      const f32x16 ungated = in.d ? fma(d, u, load(w.tile.y + i * kLanes)) : load(w.tile.y + i * kLanes);
      store_n(static_cast<T*>(p.dz) + out, mul(mul(gy, ungated), mul(gate, fma(z, sub(one, gate), one))), lanes);
      gy = mul(gy, mul(z, gate));
    }
    f32x16 dproduct, dfactor;
    reverse_row(w, k, i, gy, dproduct, dfactor);
    store_n(static_cast<T*>(p.du) + out, fma(load(w.tile.delta + i * kLanes), dproduct, in.d ? mul(d, gy) : zero()), lanes);
    f32x16 ddelta = fma(u, dproduct, mul(ln2, dfactor));
    if (in.softplus) ddelta = mul(ddelta, sigmoid(add(load_n(static_cast<const T*>(in.dt) + t * in.dt_stride + c0, lanes), bias)));
    store_n(static_cast<T*>(p.ddt) + out, ddelta, lanes);
    k.dd = fma(gy, u, k.dd);
    k.dbias = add(k.dbias, ddelta);
  }
}

template <class T> void backward_sequence(const SelectiveScanBackwardParams& p, Part& w, int64_t blocks, int64_t b, int64_t group, int64_t part) {
  const SelectiveScanInputs& in = p.in;
  const int64_t begin = p.cu_seqlens[b], length = p.cu_seqlens[b + 1] - begin, tiles = (length + kRows - 1) / kRows;
  const int64_t* s = p.h0_strides;
  for (int64_t i = 0; i < blocks; ++i) {
    BlockGrads& k = w.grads[i];
    const int64_t c0 = k.block.first;
    if (p.h0) load_columns(k.h, p.h0 + b * s[0] + c0 * s[1], s[1], s[2], k.block.lanes, in.states);
    else std::memset(k.h, 0, static_cast<size_t>(w.size) * 4);
    load_columns(k.g, p.dlast + (b * in.channels + c0) * in.states, in.states, 1, k.block.lanes, in.states);
  }
  const auto tile_rows = [&](int64_t tile) { return length - tile * kRows < kRows ? length - tile * kRows : kRows; };
  for (int64_t tile = 0; tile < tiles; ++tile) {  // states before each tile
    const int64_t count = tile_rows(tile);
    const ScanRows rows{begin, nullptr};
    scan_vectors<T>(w.b, in.b, in.b_stride, group, in.states, rows, tile * kRows, count);
    for (int64_t i = 0; i < blocks; ++i) {
      BlockGrads& k = w.grads[i];
      std::memcpy(w.kept + (tile * blocks + i) * w.size, k.h, static_cast<size_t>(w.size) * 4);
      const bool in_range = scan_inputs<T>(in, k.block, rows, tile * kRows, count, w.tile);
      scan_tile<false>(k.h, k.block.a, w.tile, w.b, w.b, count, in.states, in_range);
    }
  }
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t count = tile_rows(tile), first = begin + tile * kRows;
    const ScanRows rows{begin, nullptr};
    scan_vectors<T>(w.b, in.b, in.b_stride, group, in.states, rows, tile * kRows, count);
    scan_vectors<T>(w.c, in.c, in.c_stride, group, in.states, rows, tile * kRows, count);
    std::memset(w.db, 0, static_cast<size_t>(count * w.size) * 4);
    std::memset(w.dc, 0, static_cast<size_t>(count * w.size) * 4);
    for (int64_t i = 0; i < blocks; ++i) {
      BlockGrads& k = w.grads[i];
      const bool in_range = scan_inputs<T>(in, k.block, rows, tile * kRows, count, w.tile);
      forward_tile(w, w.kept + (tile * blocks + i) * w.size, k.block.a, count, in_range);
      reverse_tile<T>(p, w, k, first, count);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = 0; n < in.states; ++n) {
        const int64_t at = ((part * in.tokens + first + i) * in.groups + group) * in.states + n;
        p.db[at] = reduce_add(load(w.db + i * w.size + n * kLanes));
        p.dc[at] = reduce_add(load(w.dc + i * w.size + n * kLanes));
      }
  }
  for (int64_t i = 0; i < blocks; ++i)
    store_columns(p.dh0 + (b * in.channels + w.grads[i].block.first) * in.states, w.grads[i].g, in.states, 1, w.grads[i].block.lanes, in.states);
}

template <class T> void backward_part(const SelectiveScanBackwardParams& p, int64_t group, int64_t part, int64_t parts) {
  const SelectiveScanInputs& in = p.in;
  const int64_t width = in.channels / in.groups, all = (width + kLanes - 1) / kLanes, b0 = all * part / parts, blocks = all * (part + 1) / parts - b0;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    longest = length > longest ? length : longest;
  }
  const int64_t size = in.states * kLanes, tiles = (longest + kRows - 1) / kRows;
  const int64_t vectors = (kRows * in.states + 15) / 16 * 16, head = (static_cast<int64_t>(sizeof(Part)) + 63) / 64 * 64;
  const int64_t floats = 2 * vectors + (4 * kRows + 1) * size + tiles * blocks * size + 4 * blocks * size;
  char* memory = static_cast<char*>(thread_scratch(0, head + blocks * static_cast<int64_t>(sizeof(BlockGrads)) + 64 + floats * 4));
  Part& w = *reinterpret_cast<Part*>(memory);
  w.states = in.states, w.size = size;
  w.grads = reinterpret_cast<BlockGrads*>(memory + head);
  const int64_t behind = (blocks * static_cast<int64_t>(sizeof(BlockGrads)) + 63) / 64 * 64;
  float* next = reinterpret_cast<float*>(memory + head + behind);
  const auto take = [&next](int64_t n) {
    float* q = next;
    next += n;
    return q;
  };
  w.b = take(vectors), w.c = take(vectors);
  w.after = take((kRows + 1) * size), w.factor = take(kRows * size), w.db = take(kRows * size), w.dc = take(kRows * size);
  w.kept = take(tiles * blocks * size);
  for (int64_t i = 0; i < blocks; ++i) {
    BlockGrads& k = w.grads[i];
    const int64_t left = width - (b0 + i) * kLanes;
    float* a = take(size);
    k.h = take(size), k.g = take(size), k.da = take(size);
    k.block = scan_block(in, group * width + (b0 + i) * kLanes, left < kLanes ? static_cast<int>(left) : kLanes, a);
    k.dd = k.dbias = zero();
    std::memset(k.da, 0, static_cast<size_t>(size) * 4);
  }
  for (int64_t b = 0; b < p.batch; ++b) backward_sequence<T>(p, w, blocks, b, group, part);
  for (int64_t i = 0; i < blocks; ++i) {
    const BlockGrads& k = w.grads[i];
    store_columns(p.da + k.block.first * in.states, k.da, in.states, 1, k.block.lanes, in.states);
    store_n(p.dd + k.block.first, k.dd, k.block.lanes);
    store_n(p.dbias + k.block.first, k.dbias, k.block.lanes);
  }
}

}  // namespace

void selective_scan_backward(const SelectiveScanBackwardParams& p) {
  if (p.in.groups == 0 || p.in.channels == 0) return;
  const int64_t parts = scan_parts(p.in.channels, p.in.groups);
  dispatch_float(p.in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.in.groups * parts, 1, [&](int64_t task) { backward_part<T>(p, task / parts, task % parts, parts); });
  });
}

}  // namespace stretto::STRETTO_ISA
