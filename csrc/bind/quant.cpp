#include <sys/mman.h>
#include <unistd.h>

#include "bind/bind.h"
#include "host/pack_weights.h"
#include "kernels/quant/embedding.h"
#include "kernels/quant/linear.h"

namespace stretto {

static WeightFormat format_of(const char* op, const std::string& name) {
  for (int i = 0; i < kNumFormats; ++i)
    if (name == kFormatInfo[i].name) return static_cast<WeightFormat>(i);
  require(false, op, "format", name + ", expected a known one");
  return {};
}

static void require_rows(const TensorView& t, const char* op, const char* argument, int64_t rows, int64_t columns) {
  require(t.dtype == DType::f32 && t.ndim == 2 && t.contiguous_from(1) && t.shape[0] == rows && t.shape[1] == columns, op, argument,
          "expected float32 rows of contiguous elements, [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
}

static void require_packed(const TensorView& t, const char* op, WeightFormat format, int64_t n, int64_t k) {
  require(n >= 0 && k > 0 && k % format_info(format).unit == 0, op, "k", std::to_string(k) + ", expected a multiple of the format's block");
  require_tensor(t, op, "packed", DType::u8, {(n + 15) / 16 * group_bytes(format, k)});
  require(reinterpret_cast<uintptr_t>(t.ptr) % 32 == 0, op, "packed", "expected memory aligned to 32 bytes");
}

static const int32_t* row_count(const OptionalTensor& t, const char* op) {
  if (t) require_tensor(*t, op, "num_rows", DType::i32, {1});
  return data_or_null<int32_t>(t);
}

static void linear(TensorView x, TensorView packed, const std::string& format_name, int64_t n, OptionalTensor bias, OptionalTensor residual, int gate,
                   TensorView out, OptionalTensor num_rows) {
  const WeightFormat format = format_of("linear", format_name);
  require(x.ndim == 2 && gate >= 0 && gate <= 2 && (gate == 0 || n % 32 == 0), "linear", "x, gate", "expected a matrix and a known gate");
  const int64_t rows = x.shape[0], k = x.shape[1], columns = gate ? n / 2 : n;
  require_rows(x, "linear", "x", rows, k);
  require_packed(packed, "linear", format, n, k);
  require_rows(out, "linear", "out", rows, columns);
  if (bias) require_tensor(*bias, "linear", "bias", DType::f32, {n});
  if (residual) require_rows(*residual, "linear", "residual", rows, columns);
  launch("linear", linear_cpu,
         LinearParams{.x = x.data<float>(),
                      .packed = packed.data<uint8_t>(),
                      .bias = data_or_null<float>(bias),
                      .residual = data_or_null<float>(residual),
                      .out = out.data<float>(),
                      .num_rows = row_count(num_rows, "linear"),
                      .rows = rows,
                      .n = n,
                      .k = k,
                      .x_stride = x.strides[0],
                      .residual_stride = residual ? residual->strides[0] : 0,
                      .out_stride = out.strides[0],
                      .format = format,
                      .gate = static_cast<Gate>(gate)},
         x);
}

static void embedding(TensorView ids, TensorView packed, const std::string& format_name, int64_t n, float scale, TensorView out,
                      OptionalTensor num_rows) {
  const WeightFormat format = format_of("embedding", format_name);
  require_tensor(ids, "embedding", "ids", DType::i32, {-1});
  require(out.ndim == 2, "embedding", "out", "expected a matrix");
  require_rows(out, "embedding", "out", ids.shape[0], out.shape[1]);
  require_packed(packed, "embedding", format, n, out.shape[1]);
  launch("embedding", embedding_cpu,
         EmbeddingParams{.ids = ids.data<int32_t>(),
                         .packed = packed.data<uint8_t>(),
                         .out = out.data<float>(),
                         .num_rows = row_count(num_rows, "embedding"),
                         .rows = ids.shape[0],
                         .n = n,
                         .k = out.shape[1],
                         .out_stride = out.strides[0],
                         .scale = scale,
                         .format = format},
         ids);
}

// Matrices under one another, or two taking turns by groups of 16 rows.
static void pack(const std::vector<TensorView>& raws, const std::string& format_name, int64_t k, bool interleave, TensorView packed) {
  const WeightFormat format = format_of("pack", format_name);
  const FormatInfo& info = format_info(format);
  int64_t n = 0;
  for (const TensorView& raw : raws) {
    require_tensor(raw, "pack", "raw", DType::u8, {-1, k / info.unit * info.raw_bytes});
    n += raw.shape[0];
  }
  require_packed(packed, "pack", format, n, k);
  require(!interleave || (raws.size() == 2 && raws[0].shape[0] == raws[1].shape[0] && raws[0].shape[0] % 16 == 0), "pack", "raw",
          "expected two matrices of equal height, a multiple of 16, to interleave");
  py::gil_scoped_release nogil;
  int64_t first = 0;
  for (size_t i = 0; i < raws.size(); ++i) {
    pack_rows({.raw = raws[i].data<uint8_t>(),
               .packed = packed.data<uint8_t>(),
               .rows = raws[i].shape[0],
               .k = k,
               .first = interleave ? 0 : first,
               .part = interleave ? static_cast<int>(i) : -1,
               .format = format});
    first += raws[i].shape[0];
  }
  pack_padding(packed.data<uint8_t>(), n, k, format);
}

// Advice only: where the system has no huge pages to give, nothing changes.
static void prefer_huge_pages(TensorView t) {
  require_tensor(t, "prefer_huge_pages", "t", DType::u8, {-1});
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.ptr) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.ptr) + static_cast<uintptr_t>(t.numel())) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

STRETTO_BIND(quant) {
  m.def("prefer_huge_pages", &prefer_huge_pages);
  m.def("linear", &linear);
  m.def("embedding", &embedding);
  m.def("pack", &pack);
}

}  // namespace stretto
