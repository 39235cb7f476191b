#include "bind/attention_rows.h"
#include "kernels/attention/sparse_prefill.h"
#include "kernels/attention/vertical_slash.h"

namespace stretto {
namespace {

constexpr const char* kOp = "attention.sparse_prefill";

// Offsets of each list grow within 0 .. count.
void require_pointers(const TensorView& ptr, const char* argument, int64_t lists, int64_t blocks, int64_t count) {
  const int32_t* at = ptr.data<int32_t>();
  for (int64_t l = 0; l < lists; ++l)
    for (int64_t b = 0; b <= blocks; ++b, ++at)
      require(*at >= (b ? at[-1] : 0) && *at <= count, kOp, argument,
              std::to_string(*at) + " at block " + std::to_string(b) + " of list " + std::to_string(l) + ", expected growing offsets in 0.." +
                  std::to_string(count));
}

// Intervals and columns of each block grow, are apart from each other, and lie within the keys.
void require_lists(const SparsePrefillParams& p) {
  for (int64_t l = 0; l < p.list_batch * p.list_heads; ++l)
    for (int64_t b = 0; b < p.blocks; ++b) {
      const int64_t at = l * (p.blocks + 1) + b;
      const std::string where = " in block " + std::to_string(b) + " of list " + std::to_string(l);
      int64_t c = p.column_ptr[at], done = 0;  // keys below `done` were given
      const auto columns_below = [&](int64_t limit) {
        for (; c < p.column_ptr[at + 1] && p.columns[c] < limit; ++c) {
          if (p.columns[c] < done)
            throw std::invalid_argument(std::string(kOp) + ": columns: " + std::to_string(p.columns[c]) + where +
                                        ", expected growing numbers of keys outside of the intervals");
          done = int64_t(p.columns[c]) + 1;
        }
      };
      for (int64_t i = p.interval_ptr[at]; i < p.interval_ptr[at + 1]; ++i) {
        const int64_t begin = p.intervals[2 * i], end = p.intervals[2 * i + 1];
        columns_below(begin);
        if (begin < done || end <= begin || end > p.t.k_len)
          throw std::invalid_argument(std::string(kOp) + ": intervals: " + std::to_string(begin) + " to " + std::to_string(end) + where +
                                      ", expected growing intervals in 0.." + std::to_string(p.t.k_len) + ", apart from each other and from columns");
        done = end;
      }
      columns_below(p.t.k_len);
      require(c == p.column_ptr[at + 1], kOp, "columns", "a key of " + std::to_string(p.t.k_len) + " or more" + where);
    }
}

void sparse_prefill(TensorView q, TensorView k, TensorView v, TensorView interval_ptr, TensorView intervals, TensorView column_ptr,
                    TensorView columns, int64_t block, float scale, bool causal, float softcap, TensorView out, TensorView lse) {
  SparsePrefillParams p{};
  p.t = attention_tensors(kOp, q, k, v, out, lse, scale, softcap);
  require(block > 0, kOp, "block", std::to_string(block) + ", expected at least 1");
  p.block = block, p.blocks = (p.t.q_len + block - 1) / block, p.causal = causal;
  require(interval_ptr.ndim == 3 && column_ptr.ndim == 3, kOp, "interval_ptr, column_ptr", "expected 3 dimensions");
  p.list_batch = interval_ptr.shape[0], p.list_heads = interval_ptr.shape[1];
  require((p.list_batch == 1 || p.list_batch == p.t.batch) && (p.list_heads == 1 || p.list_heads == p.t.heads), kOp, "interval_ptr",
          "expected batch and heads of q, or 1");
  require_tensor(interval_ptr, kOp, "interval_ptr", DType::i32, {p.list_batch, p.list_heads, p.blocks + 1});
  require_tensor(column_ptr, kOp, "column_ptr", DType::i32, {p.list_batch, p.list_heads, p.blocks + 1});
  require_tensor(intervals, kOp, "intervals", DType::i32, {-1, 2});
  require_tensor(columns, kOp, "columns", DType::i32, {-1});
  p.interval_ptr = interval_ptr.data<int32_t>(), p.column_ptr = column_ptr.data<int32_t>();
  p.intervals = intervals.data<int32_t>(), p.columns = columns.data<int32_t>();
  p.num_intervals = intervals.shape[0], p.num_columns = columns.shape[0];
  require_pointers(interval_ptr, "interval_ptr", p.list_batch * p.list_heads, p.blocks, intervals.shape[0]);
  require_pointers(column_ptr, "column_ptr", p.list_batch * p.list_heads, p.blocks, columns.shape[0]);
  require_lists(p);
  launch("sparse_prefill", sparse_prefill_cpu, p);
}

void vertical_slash(TensorView verticals, TensorView slashes, int64_t block, int64_t q_len, int64_t k_len, TensorView interval_ptr,
                    TensorView column_ptr, OptionalTensor intervals, OptionalTensor columns) {
  constexpr const char* kName = "attention.vertical_slash_index";
  require_tensor(verticals, kName, "verticals", DType::i32, {-1, -1});
  const int64_t lists = verticals.shape[0];
  require(block > 0 && q_len >= 0 && q_len <= k_len, kName, "block", "expected at least 1, and no more queries than keys");
  const int64_t blocks = (q_len + block - 1) / block;
  require_tensor(slashes, kName, "slashes", DType::i32, {lists, -1});
  require_tensor(interval_ptr, kName, "interval_ptr", DType::i32, {lists, blocks + 1});
  require_tensor(column_ptr, kName, "column_ptr", DType::i32, {lists, blocks + 1});
  require(intervals.has_value() == columns.has_value(), kName, "intervals, columns", "expected both or none");
  if (intervals) {
    require_tensor(*intervals, kName, "intervals", DType::i32, {-1, 2});
    require_tensor(*columns, kName, "columns", DType::i32, {-1});
  }
  launch("vertical_slash", vertical_slash_cpu,
         VerticalSlashParams{.verticals = verticals.data<int32_t>(),
                             .slashes = slashes.data<int32_t>(),
                             .interval_ptr = interval_ptr.data<int32_t>(),
                             .column_ptr = column_ptr.data<int32_t>(),
                             .intervals = data_or_null<int32_t>(intervals),
                             .columns = data_or_null<int32_t>(columns),
                             .count = !intervals,
                             .lists = lists,
                             .num_verticals = verticals.shape[1],
                             .num_slashes = slashes.shape[1],
                             .blocks = blocks,
                             .block = block,
                             .q_len = q_len,
                             .k_len = k_len});
}

}  // namespace

STRETTO_BIND(attention_lists) {
  m.def("sparse_prefill", &sparse_prefill);
  m.def("vertical_slash", &vertical_slash);
}

}  // namespace stretto
