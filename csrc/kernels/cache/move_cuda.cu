#include "common/cuda_utils.cuh"
#include "kernels/cache/move.h"

namespace stretto {
namespace {

constexpr int kBlock = 256;

__device__ __forceinline__ bool in_range(int32_t id, int64_t count) { return id >= 0 && id < count; }

// A thread owns one place of a page in one layer, and does all pairs of it in order: no thread reads what another writes.
template <class Unit> __global__ void __launch_bounds__(kBlock) copy_pages_kernel(const CacheMoveParams p, const CachePlane plane) {
  const int64_t page_units = p.heads * plane.outer * p.page_size * plane.inner * plane.element_bytes / int64_t(sizeof(Unit));
  const int64_t at = int64_t(blockIdx.x) * kBlock + threadIdx.x, layer = blockIdx.y;
  if (at >= page_units) return;
  const int64_t bytes = plane.element_bytes, step = plane.page_stride * bytes / int64_t(sizeof(Unit));
  Unit* base = reinterpret_cast<Unit*>(plane.base + layer * plane.layer_stride * bytes) + at;
  for (int64_t i = 0; i < p.pairs; ++i) {
    const int32_t src = p.src[i], dst = p.dst[i];
    if (in_range(src, p.pages) && in_range(dst, p.pages) && src != dst) base[dst * step] = base[src * step];
  }
}

// The same for one element of a row: a key row is a column of its page, head_dim elements that lie page_size apart.
template <class Element> __global__ void __launch_bounds__(kBlock) move_rows_kernel(const CacheMoveParams p, const CachePlane plane) {
  const int64_t row_elements = p.heads * plane.outer * plane.inner;
  const int64_t element = int64_t(blockIdx.x) * kBlock + threadIdx.x, layer = blockIdx.y;
  if (element >= row_elements) return;
  const int64_t slots = p.pages * p.page_size;
  Element* base =
      reinterpret_cast<Element*>(plane.base) + layer * plane.layer_stride + element / plane.inner * p.page_size * plane.inner + element % plane.inner;
  const auto place = [&](int64_t slot) { return slot / p.page_size * plane.page_stride + slot % p.page_size * plane.inner; };
  for (int64_t i = 0; i < p.pairs; ++i) {
    const int32_t src = p.src[i], dst = p.dst[i];
    if (in_range(src, slots) && in_range(dst, slots) && src != dst) base[place(dst)] = base[place(src)];
  }
}

template <class F> void dispatch_unit(int64_t bytes, const F& f) {
  if (bytes == 16) f(TypeTag<uint4>{});
  else if (bytes == 4) f(TypeTag<uint32_t>{});
  else if (bytes == 2) f(TypeTag<uint16_t>{});
  else f(TypeTag<uint8_t>{});
}

dim3 grid_of(const CacheMoveParams& p, int64_t units) { return dim3(unsigned(ceil_div<int64_t>(units, kBlock)), unsigned(p.layers)); }

}  // namespace

void copy_pages_cuda(const CacheMoveParams& p, cudaStream_t stream) {
  if (p.pairs == 0 || p.layers == 0) return;
  for (const CachePlane& plane : p.planes) {
    const int64_t page_bytes = p.heads * plane.outer * p.page_size * plane.inner * plane.element_bytes;
    if (!plane.base || page_bytes == 0) continue;
    const bool packs =
        aligned16(plane.base) && (page_bytes | plane.layer_stride * plane.element_bytes | plane.page_stride * plane.element_bytes) % 16 == 0;
    dispatch_unit(packs ? 16 : plane.element_bytes, [&](auto tag) {
      using Unit = typename decltype(tag)::type;
      launch_kernel<copy_pages_kernel<Unit>>({.grid = grid_of(p, page_bytes / int64_t(sizeof(Unit))), .block = kBlock, .stream = stream}, p, plane);
    });
  }
}

void move_rows_cuda(const CacheMoveParams& p, cudaStream_t stream) {
  if (p.pairs == 0 || p.layers == 0) return;
  for (const CachePlane& plane : p.planes) {
    const int64_t row_elements = p.heads * plane.outer * plane.inner;
    if (!plane.base || row_elements == 0) continue;
    dispatch_unit(plane.element_bytes, [&](auto tag) {
      launch_kernel<move_rows_kernel<typename decltype(tag)::type>>({.grid = grid_of(p, row_elements), .block = kBlock, .stream = stream}, p, plane);
    });
  }
}

STRETTO_CUDA_KERNEL(copy_pages, CacheMoveParams)
STRETTO_CUDA_KERNEL(move_rows, CacheMoveParams)

}  // namespace stretto
