// Which rows and which state belong to a sequence. Values are clamped, so that a captured step that is given nonsense stays in bounds.
#pragma once
#include <cstdint>

#include "common/tensor_view.h"

namespace stretto {

struct RowRange { int64_t begin, end; };

#if defined(__CUDACC__)
#define STRETTO_SCAN_FN __host__ __device__ inline
#else
#define STRETTO_SCAN_FN static inline __attribute__((always_inline))
#endif

// Rows of sequence b: cu_seqlens[b] to cu_seqlens[b + 1], or row b alone where there is no cu_seqlens.
STRETTO_SCAN_FN RowRange rows_of(const int32_t* cu_seqlens, int64_t b, int64_t tokens) {
  if (!cu_seqlens) return {b, b + 1};
  const int64_t first = cu_seqlens[b], last = cu_seqlens[b + 1];
  const int64_t begin = first < 0 ? 0 : first < tokens ? first : tokens;
  return {begin, last < begin ? begin : last < tokens ? last : tokens};
}

// The grain that cuts `tasks` into as many equal parts as parts of `grain` would make: a short last part would leave a thread idle.
STRETTO_SCAN_FN int64_t even_grain(int64_t tasks, int64_t grain) {
  const int64_t parts = (tasks + grain - 1) / grain;
  return parts > 0 ? (tasks + parts - 1) / parts : 1;
}

// The slot of sequence b, or -1 where it is idle.
STRETTO_SCAN_FN int64_t slot_of(const int32_t* slots, int64_t b, int64_t num_slots) {
  const int64_t slot = slots ? slots[b] : b;
  return slot >= 0 && slot < num_slots ? slot : -1;
}

// The row that row i of a sequence follows: -1 is the sequence's state.
STRETTO_SCAN_FN int64_t parent_of(const int32_t* parent, int64_t begin, int64_t i) {
  if (!parent) return i - 1;
  const int64_t p = parent[begin + i];
  return p < i ? p : -1;
}

// How many leading entries of list b of rows to replay are legal.
STRETTO_SCAN_FN int64_t replay_count(const int32_t* rows, const int32_t* n, int64_t b, int64_t max_rows, int64_t inputs) {
  const int64_t wish = n[b] < max_rows ? n[b] : max_rows;
  int64_t count = 0;
  while (count < wish && rows[b * max_rows + count] >= 0 && rows[b * max_rows + count] < inputs) ++count;
  return count;
}

}  // namespace stretto
