#include "bind/bind.h"
#include "kernels/rope/rope_append.h"

namespace stretto {
namespace {

constexpr const char* kOp = "rope.append";

void rope_append(TensorView qkv, TensorView positions, TensorView slots, TensorView cos_sin, TensorView k_pages, TensorView v_pages, int64_t heads,
                 int64_t kv_heads, bool interleaved, OptionalTensor q_norm, OptionalTensor k_norm, float norm_eps, OptionalTensor k_scales,
                 OptionalTensor v_scales, OptionalTensor num_rows) {
  require(k_pages.ndim == 4 && v_pages.ndim == 4 && k_pages.contiguous_from(1) && v_pages.contiguous_from(1), kOp, "k_pages, v_pages",
          "expected dense pages");
  const int64_t pages = k_pages.shape[0], head_dim = k_pages.shape[2], page_size = k_pages.shape[3], rows = qkv.shape[0];
  require(k_pages.shape[1] == kv_heads && v_pages.shape[0] == pages && v_pages.shape[1] == kv_heads && v_pages.shape[2] == page_size &&
              v_pages.shape[3] == head_dim && v_pages.dtype == k_pages.dtype,
          kOp, "v_pages", "does not match k_pages and num_kv_heads");
  require(heads >= 0 && kv_heads >= 0, kOp, "num_heads, num_kv_heads", "expected at least 0");
  require(qkv.ndim == 2 && qkv.dtype == DType::f32 && qkv.contiguous_from(1) && qkv.shape[1] == (heads + 2 * kv_heads) * head_dim, kOp, "qkv",
          "expected float32 [rows, (heads + 2 kv_heads) * head_dim] with contiguous rows");
  require_tensor(positions, kOp, "positions", DType::i32, {rows});
  require_tensor(slots, kOp, "slots", DType::i32, {rows});
  require_tensor(cos_sin, kOp, "cos_sin", DType::f32, {-1, -1});
  require(cos_sin.shape[1] % 2 == 0 && cos_sin.shape[1] <= head_dim && head_dim % 16 == 0 && head_dim <= kMaxHeadDim, kOp, "cos_sin",
          "rotary_dim does not fit head_dim");
  for (const OptionalTensor& w : {q_norm, k_norm})
    if (w) require_tensor(*w, kOp, "q_norm, k_norm", DType::f32, {head_dim});
  require((k_pages.dtype == DType::i8) == k_scales.has_value() && k_scales.has_value() == v_scales.has_value(), kOp, "k_scales, v_scales",
          "expected with int8 pages, and only then");
  for (const OptionalTensor& s : {k_scales, v_scales})
    if (s) require_tensor(*s, kOp, "k_scales, v_scales", DType::f32, {pages, kv_heads, page_size}, 1);
  const RopeAppendParams p{.qkv = qkv.data<float>(),
                           .positions = positions.data<int32_t>(),
                           .slots = slots.data<int32_t>(),
                           .cos_sin = cos_sin.data<float>(),
                           .q_norm = data_or_null<float>(q_norm),
                           .k_norm = data_or_null<float>(k_norm),
                           .k_pages = k_pages.data(),
                           .v_pages = v_pages.data(),
                           .k_scales = data_or_null<float>(k_scales),
                           .v_scales = data_or_null<float>(v_scales),
                           .num_rows = data_or_null<int32_t>(num_rows),
                           .rows = rows,
                           .heads = heads,
                           .kv_heads = kv_heads,
                           .head_dim = head_dim,
                           .rotary_dim = cos_sin.shape[1],
                           .row_stride = qkv.strides[0],
                           .max_positions = cos_sin.shape[0],
                           .pages = pages,
                           .page_size = page_size,
                           .k_page = k_pages.strides[0],
                           .v_page = v_pages.strides[0],
                           .k_scale_page = k_scales ? k_scales->strides[0] : 0,
                           .v_scale_page = v_scales ? v_scales->strides[0] : 0,
                           .norm_eps = norm_eps,
                           .interleaved = interleaved,
                           .dtype = k_pages.dtype};
  // On CUDA a slot out of range writes nothing, and a position out of range takes the nearest.
  const int64_t used = qkv.cuda ? 0 : p.num_rows && *p.num_rows < rows ? *p.num_rows : rows;
  for (int64_t i = 0; i < used; ++i) {
    require(p.positions[i] >= 0 && p.positions[i] < p.max_positions, kOp, "positions",
            std::to_string(p.positions[i]) + " in row " + std::to_string(i) + ", expected 0.." + std::to_string(p.max_positions - 1));
    require(p.slots[i] >= -1 && p.slots[i] < pages * page_size, kOp, "slots",
            std::to_string(p.slots[i]) + " in row " + std::to_string(i) + ", expected -1.." + std::to_string(pages * page_size - 1));
  }
  launch("rope_append", rope_append_cpu, p, qkv);
}

}  // namespace

STRETTO_BIND(rope) { m.def("rope_append", &rope_append); }

}  // namespace stretto
