#include "kernels/attention/dense_attention.h"

#include "kernels/attention/dense_block.h"

namespace stretto::STRETTO_ISA {

template <class T> static void attend_block(const DenseAttentionParams& p, const DenseSequence& s, const BlockRows& b, int64_t kv_head) {
  RowBlock<T> block(p.t.head_dim, p.t.softcap, false, block_memory<T>(p.t));
  begin_rows(block, p.t, b);
  const int64_t first = b.first - s.q_begin;
  const int64_t begin = keys_of(s, p.visible, first).begin, end = keys_of(s, p.visible, first + b.queries - 1).end;
  for (int64_t base = begin / kSplit * kSplit; base < end; base += kSplit) {
    set_keys(block, p.t, s, kv_head, base, end);
    set_seen(block, s, p.visible, b, base);
    block.join_split();
  }
  finish_rows(block, p.t, b);
}

void dense_attention(const DenseAttentionParams& p) {
  dispatch_float(p.t.dtype, [&](auto tag) {
    for_dense_blocks(p.t, p.sequences, p.visible, [&](const DenseSequence& s, const BlockRows& b, int64_t kv_head) {
      attend_block<typename decltype(tag)::type>(p, s, b, kv_head);
    });
  });
}

}  // namespace stretto::STRETTO_ISA
