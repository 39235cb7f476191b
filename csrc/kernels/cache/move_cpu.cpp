#include "kernels/cache/move.h"

#include <cstring>

#include "common/parallel.h"

namespace stretto::STRETTO_ISA {

// Layers to a task: some 256 KB of reads, about 20 us of one core. Accepted rows and one copied page of a small model stay on the caller.
static int64_t layers_per_task(const CacheMoveParams& p, int64_t rows) {
  int64_t bytes = 0;
  for (const CachePlane& plane : p.planes)
    if (plane.base) bytes += p.heads * plane.outer * plane.inner * plane.element_bytes;
  return 262144 / (bytes * rows * p.pairs + 1) + 1;
}

static bool in_range(int32_t id, int64_t count) { return id >= 0 && id < count; }

void copy_pages(const CacheMoveParams& p) {
  parallel_for(0, p.layers, layers_per_task(p, p.page_size), [&](int64_t layer) {
    for (const CachePlane& plane : p.planes) {
      if (!plane.base) continue;
      const int64_t page_bytes = p.heads * plane.outer * p.page_size * plane.inner * plane.element_bytes;
      char* base = plane.base + layer * plane.layer_stride * plane.element_bytes;
      const int64_t page_step = plane.page_stride * plane.element_bytes;
      for (int64_t i = 0; i < p.pairs; ++i) {
        if (!in_range(p.src[i], p.pages) || !in_range(p.dst[i], p.pages) || p.src[i] == p.dst[i]) continue;
        std::memcpy(base + p.dst[i] * page_step, base + p.src[i] * page_step, static_cast<size_t>(page_bytes));
      }
    }
  });
}

// A key row is a column of its page: head_dim single elements, page_size apart.
template <class T> static void move_column(char* base, int64_t from, int64_t to, int64_t count, int64_t stride) {
  T* values = reinterpret_cast<T*>(base);
  for (int64_t i = 0; i < count; ++i) values[to + i * stride] = values[from + i * stride];
}

static void move_plane_row(const CachePlane& plane, char* base, int64_t page_size, int32_t src, int32_t dst, int64_t heads) {
  const int64_t from = src / page_size * plane.page_stride + src % page_size * plane.inner;
  const int64_t to = dst / page_size * plane.page_stride + dst % page_size * plane.inner;
  const int64_t stride = page_size * plane.inner, count = heads * plane.outer;  // heads and outer are adjacent: one run of rows
  if (plane.inner == 1) {
    if (plane.element_bytes == 1) return move_column<uint8_t>(base, from, to, count, stride);
    if (plane.element_bytes == 2) return move_column<uint16_t>(base, from, to, count, stride);
    return move_column<uint32_t>(base, from, to, count, stride);
  }
  const size_t bytes = static_cast<size_t>(plane.inner * plane.element_bytes);
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(base + (to + i * stride) * plane.element_bytes, base + (from + i * stride) * plane.element_bytes, bytes);
}

void move_rows(const CacheMoveParams& p) {
  const int64_t slots = p.pages * p.page_size;
  parallel_for(0, p.layers, layers_per_task(p, 1), [&](int64_t layer) {
    for (const CachePlane& plane : p.planes) {
      if (!plane.base) continue;
      char* base = plane.base + layer * plane.layer_stride * plane.element_bytes;
      for (int64_t i = 0; i < p.pairs; ++i)
        if (in_range(p.src[i], slots) && in_range(p.dst[i], slots) && p.src[i] != p.dst[i])
          move_plane_row(plane, base, p.page_size, p.src[i], p.dst[i], p.heads);
    }
  });
}

}  // namespace stretto::STRETTO_ISA
