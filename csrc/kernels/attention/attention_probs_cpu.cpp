#include "kernels/attention/attention_probs.h"

#include "kernels/attention/dense_block.h"

namespace stretto::STRETTO_ISA {

// First n of 16 weights at place i of any float type.
STRETTO_INLINE void write_weights(void* to, DType dtype, int64_t i, f32x16 x, int n) {
  dispatch_float(dtype, [&](auto tag) {
    auto* at = static_cast<typename decltype(tag)::type*>(to) + i;
    n >= kLanes ? store(at, x) : store_some(at, x, n);
  });
}
STRETTO_INLINE f32x16 read_weights(const void* from, DType dtype, int64_t i, int n) {
  f32x16 x = zero();
  dispatch_float(dtype, [&](auto tag) {
    const auto* at = static_cast<const typename decltype(tag)::type*>(from) + i;
    x = n >= kLanes ? load(at) : load_some(at, n);
  });
  return x;
}

// Weights of one block as they come, split by split, relative to each split's largest score.
struct KeptWeights {
  float *weights, *largest;  // [rows, width], [rows, splits]
  int64_t width, splits;

  KeptWeights(int64_t rows, int64_t k_len) : width((k_len + kLanes - 1) / kLanes * kLanes), splits((k_len + kSplit - 1) / kSplit) {
    weights = static_cast<float*>(thread_scratch(3, rows * (width + splits) * 4));
    largest = weights + rows * width;
    for (int64_t i = 0; i < rows * width; i += kLanes) store(weights + i, zero());
    for (int64_t i = 0; i < rows * splits; ++i) largest[i] = -__builtin_inff();  // no keys
  }

  template <class T> void keep(RowBlock<T>& block, int rows, int64_t base) {
    for (int r = 0; r < rows; ++r) {
      largest[r * splits + base / kSplit] = block.split_max(r);
      for (int j = 0; j < block.keys.count; j += kLanes)
        if (const uint32_t bits = block.lanes_of(block.seen[r], j))
          store(weights + r * width + base + j, select(bits, load(block.score_row(r) + j), zero()));
    }
  }

  void write(int r, float lse, void* probs, DType dtype, int64_t at, int64_t k_len) const {
    for (int64_t j = 0; j < k_len; j += kLanes) {
      const float m = largest[r * splits + j / kSplit];
      const f32x16 scale = m == -__builtin_inff() ? zero() : exp(broadcast(m - lse));
      write_weights(probs, dtype, at + j, mul(load(weights + r * width + j), scale), static_cast<int>(k_len - j < kLanes ? k_len - j : kLanes));
    }
  }
};

template <class T> static void probs_block(const AttentionWithProbsParams& p, const DenseSequence& s, const BlockRows& b, int64_t kv_head) {
  const AttentionTensors& t = p.t;
  RowBlock<T> block(t.head_dim, t.softcap, false, block_memory<T>(t));
  KeptWeights kept(b.count(), t.k_len);
  begin_rows(block, t, b);
  const int64_t begin = keys_of(s, p.visible, b.first).begin, end = keys_of(s, p.visible, b.first + b.queries - 1).end;
  for (int64_t base = begin / kSplit * kSplit; base < end; base += kSplit) {
    set_keys(block, t, s, kv_head, base, end);
    set_seen(block, s, p.visible, b, base);
    block.join_split();
    kept.keep(block, b.count(), base);
  }
  finish_rows(block, t, b);
  for (int r = 0; r < b.count(); ++r)
    kept.write(r, t.lse[(b.entry * t.q_len + b.query(r)) * t.heads + b.head_of(r)], p.probs, p.probs_dtype,
               ((b.entry * t.heads + b.head_of(r)) * t.q_len + b.query(r)) * t.k_len, t.k_len);
}

void attention_with_probs(const AttentionWithProbsParams& p) {
  dispatch_float(p.t.dtype, [&](auto tag) {
    for_dense_blocks(p.t, Sequences{nullptr, nullptr, p.t.batch}, p.visible, [&](const DenseSequence& s, const BlockRows& b, int64_t kv_head) {
      probs_block<typename decltype(tag)::type>(p, s, b, kv_head);
    });
  });
}

// A row's weights of the keys base, base + 1, ..., and which of them are not zero.
template <class T> static void read_row(const ApplyProbsParams& p, const BlockRows& b, RowBlock<T>& block, int r, int64_t base) {
  const int64_t row = b.entry * p.probs_batch + b.head_of(r) * p.probs_head + b.query(r) * p.probs_row + base;
  SeenKeys seen{};
  for (int j = 0; j < block.keys.count; j += kLanes) {
    const int left = block.keys.count - j;
    const f32x16 w = read_weights(p.probs, p.probs_dtype, row + j, left < kLanes ? left : kLanes);
    store(block.score_row(r) + j, w);
    const uint64_t nonzero = ~(mask_ge(w, zero()) & mask_ge(zero(), w)) & 0xffff;
    seen.word[j / kChunk] |= nonzero << (j % kChunk);
  }
  block.seen[r] = seen;
}

template <class T> static void apply_block(const ApplyProbsParams& p, const DenseSequence& s, const BlockRows& b, int64_t kv_head) {
  RowBlock<T> block(p.t.head_dim, 0.f, false, block_memory<T>(p.t));
  block.begin_sums(b.count());
  const T* value = static_cast<const T*>(p.t.v) + p.t.v_strides.at(s.entry, 0, kv_head);
  for (int64_t base = 0; base < p.t.k_len; base += kSplit) {
    block.keys.count = static_cast<int>(p.t.k_len - base < kSplit ? p.t.k_len - base : kSplit);
    for (int j = 0; j < block.keys.count; ++j) block.keys.value[j] = value + (base + j) * p.t.v_strides.row;
    for (int r = 0; r < b.count(); ++r) read_row(p, b, block, r, base);
    block.add_split();
  }
  for (int r = 0; r < b.count(); ++r) block.finish_sums(r, static_cast<T*>(p.t.out) + p.t.out_strides.at(b.entry, b.query(r), b.head_of(r)));
}

void apply_probs(const ApplyProbsParams& p) {
  dispatch_float(p.t.dtype, [&](auto tag) {
    for_dense_blocks(
        p.t, Sequences{nullptr, nullptr, p.t.batch}, Visible{false, 0},
        [&](const DenseSequence& s, const BlockRows& b, int64_t kv_head) { apply_block<typename decltype(tag)::type>(p, s, b, kv_head); });
  });
}

}  // namespace stretto::STRETTO_ISA
