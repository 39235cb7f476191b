#include "kernels/attention/paged_attention.h"

#include "bind/bind.h"

namespace stretto {
namespace {

constexpr const char* kOp = "attention.paged";

void require_ints(const TensorView& t, const char* argument, DType dtype, int ndim) {
  require(t.dtype == dtype && t.ndim == ndim && t.contiguous(), kOp, argument,
          std::string("expected contiguous ") + dtype_name(dtype) + " of " + std::to_string(ndim) + " dimensions");
}

// Values that Python would have to copy out to see. One pass over R numbers and the page ids in use.
void require_values(const PagedAttentionParams& p) {
  const int64_t seqs = p.num_seqs && *p.num_seqs < p.seqs ? *p.num_seqs : p.seqs;
  for (int64_t r = 0; r < seqs; ++r) {
    const std::string at = " of sequence " + std::to_string(r);
    require(p.cu_q[r] >= 0 && p.cu_q[r] <= p.cu_q[r + 1] && p.cu_q[r + 1] <= p.rows, kOp, "cu_q",
            "rows " + std::to_string(p.cu_q[r]) + " to " + std::to_string(p.cu_q[r + 1]) + at + ", expected a growing range in 0.." +
                std::to_string(p.rows));
    const int64_t rows = p.cu_q[r + 1] - p.cu_q[r], end = p.cached[r] + rows;
    require(p.cached[r] >= 0, kOp, "cached", std::to_string(p.cached[r]) + at + ", expected at least 0");
    if (rows == 0) continue;
    require(end <= p.table_width * p.page_size, kOp, "cached",
            std::to_string(end) + " positions" + at + ", expected at most " + std::to_string(p.table_width * p.page_size) + " (pages of the table)");
    for (int64_t i = 0; i * p.page_size < end; ++i) {
      const int32_t page = p.table[r * p.table_width + i];
      require(page >= 0 && page < p.pages, kOp, "table", "page " + std::to_string(page) + at + ", expected 0.." + std::to_string(p.pages - 1));
    }
    if (!p.mask_start || p.mask_start[r] < 0) continue;
    require(p.mask != nullptr, kOp, "mask", "missing" + at + ", whose mask_start is not -1");
    require(p.mask_start[r] + rows <= p.mask_rows && rows <= p.mask_words * 64, kOp, "mask_start",
            std::to_string(rows) + " rows from " + std::to_string(p.mask_start[r]) + at + ", expected within the " + std::to_string(p.mask_rows) +
                " rows of mask and at most 64 rows a word");
  }
}

void paged_attention(TensorView q, TensorView k_pages, TensorView v_pages, TensorView table, TensorView cu_q, TensorView cached, float scale,
                     int64_t window, float softcap, OptionalTensor mask, OptionalTensor mask_start, OptionalTensor k_scales, OptionalTensor v_scales,
                     TensorView out, OptionalTensor num_seqs) {
  require(q.ndim == 3 && q.dtype == DType::f32 && q.contiguous_from(2), kOp, "q", "expected float32 [rows, heads, head_dim] with adjacent elements");
  require(k_pages.ndim == 4 && v_pages.ndim == 4 && k_pages.contiguous_from(1) && v_pages.contiguous_from(1), kOp, "k_pages, v_pages",
          "expected dense pages");
  const int64_t pages = k_pages.shape[0], kv_heads = k_pages.shape[1], head_dim = q.shape[2], page_size = k_pages.shape[3];
  require(k_pages.shape[2] == head_dim && v_pages.shape[0] == pages && v_pages.shape[1] == kv_heads && v_pages.shape[2] == page_size &&
              v_pages.shape[3] == head_dim && v_pages.dtype == k_pages.dtype,
          kOp, "v_pages", "does not match k_pages and q");
  require(kv_heads > 0 && q.shape[1] > 0 && q.shape[1] % kv_heads == 0 && head_dim % 16 == 0 && page_size > 0, kOp, "q",
          "heads or head_dim do not fit the pages");
  require_ints(table, "table", DType::i32, 2);
  require_ints(cu_q, "cu_q", DType::i32, 1);
  require_ints(cached, "cached", DType::i32, 1);
  const int64_t seqs = cached.shape[0];
  require(table.shape[0] == seqs && cu_q.shape[0] == seqs + 1, kOp, "table, cu_q", "sequences differ from cached");
  require(table.shape[1] < (int64_t(1) << 31) / page_size, kOp, "table", "more than 2^31 positions");
  require(out.dtype == DType::f32 && out.ndim == 3 && out.contiguous_from(1) && out.shape[0] == q.shape[0] && out.shape[1] == q.shape[1] &&
              out.shape[2] == head_dim,
          kOp, "out", "expected float32 of q's shape with contiguous rows");
  if (mask) require_ints(*mask, "mask", DType::i64, 2);
  if (mask) require(mask->shape[1] <= 4, kOp, "mask", "more than 4 words a row (256 nodes)");
  if (mask_start) require_ints(*mask_start, "mask_start", DType::i32, 1);
  if (mask_start) require(mask_start->shape[0] == seqs, kOp, "mask_start", "sequences differ from cached");
  require((k_pages.dtype == DType::i8) == k_scales.has_value() && k_scales.has_value() == v_scales.has_value(), kOp, "k_scales, v_scales",
          "expected with int8 pages, and only then");
  for (const OptionalTensor& s : {k_scales, v_scales})
    if (s) require_tensor(*s, kOp, "k_scales, v_scales", DType::f32, {pages, kv_heads, page_size}, 1);
  const PagedAttentionParams p{.q = q.data<float>(),
                               .k_pages = k_pages.data(),
                               .v_pages = v_pages.data(),
                               .k_scales = data_or_null<float>(k_scales),
                               .v_scales = data_or_null<float>(v_scales),
                               .table = table.data<int32_t>(),
                               .cu_q = cu_q.data<int32_t>(),
                               .cached = cached.data<int32_t>(),
                               .num_seqs = data_or_null<int32_t>(num_seqs),
                               .mask = data_or_null<uint64_t>(mask),
                               .mask_start = data_or_null<int32_t>(mask_start),
                               .out = out.data<float>(),
                               .rows = q.shape[0],
                               .heads = q.shape[1],
                               .kv_heads = kv_heads,
                               .head_dim = head_dim,
                               .pages = pages,
                               .page_size = page_size,
                               .seqs = seqs,
                               .table_width = table.shape[1],
                               .mask_rows = mask ? mask->shape[0] : 0,
                               .mask_words = mask ? mask->shape[1] : 0,
                               .q_row = q.strides[0],
                               .q_head = q.strides[1],
                               .out_row = out.strides[0],
                               .k_page = k_pages.strides[0],
                               .v_page = v_pages.strides[0],
                               .k_scale_page = k_scales ? k_scales->strides[0] : 0,
                               .v_scale_page = v_scales ? v_scales->strides[0] : 0,
                               .window = window,
                               .scale = scale,
                               .softcap = softcap,
                               .dtype = k_pages.dtype};
  if (!q.cuda) require_values(p);
  launch("paged_attention", paged_attention_cpu, p, q);
}

}  // namespace

STRETTO_BIND(attention) { m.def("paged_attention", &paged_attention); }

}  // namespace stretto
