#include "bind/bind.h"
#include "kernels/cache/move.h"

namespace stretto {
namespace {

// Checks tensors and ids of either op: src and dst are slots if `rows`, else pages.
CacheMoveParams move_params(const char* op, const TensorView& k, const TensorView& v, const TensorView& src, const TensorView& dst,
                            const OptionalTensor& k_scales, const OptionalTensor& v_scales, bool rows) {
  require(k.ndim == 5 && v.ndim == 5, op, "k, v", "expected 5 dimensions");
  const int64_t layers = k.shape[0], pages = k.shape[1], heads = k.shape[2], head_dim = k.shape[3], page_size = k.shape[4];
  require_tensor(k, op, "k", k.dtype, {layers, pages, heads, head_dim, page_size}, 2);
  require_tensor(v, op, "v", k.dtype, {layers, pages, heads, page_size, head_dim}, 2);
  require(k.dtype == DType::f32 || k.dtype == DType::f16 || k.dtype == DType::bf16 || k.dtype == DType::i8, op, "k",
          std::string(dtype_name(k.dtype)) + ", expected float32, float16, bfloat16 or int8");
  if (k_scales) require_tensor(*k_scales, op, "k_scales", DType::f32, {layers, pages, heads, page_size}, 2);
  if (v_scales) require_tensor(*v_scales, op, "v_scales", DType::f32, {layers, pages, heads, page_size}, 2);
  require_tensor(src, op, "src", DType::i32, {-1});
  require_tensor(dst, op, "dst", DType::i32, {src.shape[0]});
  const int64_t limit = rows ? pages * page_size : pages;
  if (!k.cuda)  // on CUDA such a pair is skipped
    for (const auto& [name, ids] : {std::pair{"src", src}, std::pair{"dst", dst}})
      for (int64_t i = 0; i < ids.shape[0]; ++i)
        require(ids.data<int32_t>()[i] >= -1 && ids.data<int32_t>()[i] < limit, op, name,
                std::to_string(ids.data<int32_t>()[i]) + ", expected -1 (skip) or an id below " + std::to_string(limit));
  const int64_t bytes = dtype_bytes(k.dtype);
  const auto scales = [](const OptionalTensor& s) { return s ? CachePlane{s->ptr, 1, 1, 4, s->strides[0], s->strides[1]} : CachePlane{}; };
  return {.planes = {{k.ptr, head_dim, 1, bytes, k.strides[0], k.strides[1]},
                     {v.ptr, 1, head_dim, bytes, v.strides[0], v.strides[1]},
                     scales(k_scales),
                     scales(v_scales)},
          .src = src.data<int32_t>(),
          .dst = dst.data<int32_t>(),
          .pairs = src.shape[0],
          .layers = layers,
          .pages = pages,
          .heads = heads,
          .page_size = page_size};
}

void copy_pages(TensorView k, TensorView v, TensorView src, TensorView dst, OptionalTensor k_scales, OptionalTensor v_scales) {
  launch("copy_pages", copy_pages_cpu, move_params("copy_pages", k, v, src, dst, k_scales, v_scales, false), k);
}

void move_rows(TensorView k, TensorView v, TensorView src, TensorView dst, OptionalTensor k_scales, OptionalTensor v_scales) {
  launch("move_rows", move_rows_cpu, move_params("move_rows", k, v, src, dst, k_scales, v_scales, true), k);
}

}  // namespace

STRETTO_BIND(cache) {
  m.def("copy_pages", &copy_pages);
  m.def("move_rows", &move_rows);
}

}  // namespace stretto
