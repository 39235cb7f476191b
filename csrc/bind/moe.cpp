#include <algorithm>

#include "bind/bind.h"
#include "host/expert_placement.h"
#include "kernels/moe/coactivation.h"
#include "kernels/moe/grouped_linear.h"
#include "kernels/moe/permute_rows.h"
#include "kernels/moe/plan_dispatch.h"
#include "kernels/moe/sort_by_expert.h"
#include "kernels/moe/topk_route.h"

namespace stretto {

static void topk_route(TensorView logits, OptionalTensor bias, int64_t groups, int64_t top_groups, int64_t group_top, bool sigmoid, bool renormalise,
                       float scale, TensorView weights, TensorView chosen, OptionalTensor num_rows) {
  const char* op = "moe.topk_route";
  require(logits.ndim == 2 && logits.contiguous_from(1), op, "logits", "expected rows of contiguous elements");
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  require(weights.ndim == 2, op, "weights", "expected [tokens, k]");
  const int64_t k = weights.shape[1];
  require_tensor(weights, op, "weights", DType::f32, {tokens, k});
  require_tensor(chosen, op, "experts", DType::i32, {tokens, k});
  if (bias) require_tensor(*bias, op, "bias", DType::f32, {experts});
  if (num_rows) require_tensor(*num_rows, op, "num_rows", DType::i32, {1});
  require(groups >= 1 && experts % groups == 0 && top_groups >= 1 && top_groups <= groups && (group_top == 1 || group_top == 2), op, "groups",
          "expected to divide the experts");
  require(k >= 1 && k <= top_groups * (experts / groups), op, "k", "expected at most the experts that can be chosen");
  launch("topk_route", topk_route_cpu,
         TopkRouteParams{.logits = logits.data(),
                         .bias = data_or_null<float>(bias),
                         .weights = weights.data<float>(),
                         .chosen = chosen.data<int32_t>(),
                         .num_rows = data_or_null<int32_t>(num_rows),
                         .tokens = tokens,
                         .experts = experts,
                         .k = k,
                         .logits_stride = logits.strides[0],
                         .groups = groups,
                         .top_groups = top_groups,
                         .group_top = group_top,
                         .scale = scale,
                         .sigmoid = sigmoid,
                         .renormalise = renormalise,
                         .dtype = logits.dtype});
}

// Kernels skip ids out of range, so that a replayed step is safe; a direct call is told.
static void require_ids(const TensorView& ids, const char* op, const char* argument, int64_t end, int64_t lowest) {
  const int32_t* p = ids.data<int32_t>();
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i)
    if (p[i] < lowest || p[i] >= end)  // the message is built for a wrong id only
      require(false, op, argument,
              std::to_string(p[i]) + " at " + std::to_string(i) + ", expected " + std::to_string(lowest) + ".." + std::to_string(end - 1));
}

static void sort_by_expert(TensorView chosen, int64_t multiple, TensorView counts, TensorView offsets, TensorView pairs, TensorView rows) {
  const char* op = "moe.sort_by_expert";
  require(chosen.ndim == 2 && counts.ndim == 1 && multiple >= 1, op, "experts", "expected [tokens, k]");
  const int64_t num_pairs = chosen.numel(), experts = counts.shape[0];
  require_tensor(chosen, op, "experts", DType::i32, {-1, -1});
  require_tensor(counts, op, "counts", DType::i32, {experts});
  require_tensor(offsets, op, "offsets", DType::i32, {experts + 1});
  require_tensor(pairs, op, "pairs", DType::i32, {-1});
  require_tensor(rows, op, "rows", DType::i32, {chosen.shape[0], chosen.shape[1]});
  require(pairs.shape[0] >= num_pairs + (num_pairs < experts ? num_pairs : experts) * (multiple - 1), op, "pairs", "too short");
  require_ids(chosen, op, "experts", experts, -1);
  launch("sort_by_expert", sort_by_expert_cpu,
         SortByExpertParams{.chosen = chosen.data<int32_t>(),
                            .counts = counts.data<int32_t>(),
                            .offsets = offsets.data<int32_t>(),
                            .pairs = pairs.data<int32_t>(),
                            .rows = rows.data<int32_t>(),
                            .num_pairs = num_pairs,
                            .experts = experts,
                            .multiple = multiple,
                            .capacity = pairs.shape[0]});
}

static void permute_rows(TensorView x, TensorView pairs, int64_t k, TensorView out) {
  const char* op = "moe.permute";
  require(x.ndim == 2 && x.contiguous_from(1) && k >= 1, op, "x", "expected rows of contiguous elements");
  require_tensor(pairs, op, "pairs", DType::i32, {-1});
  require_tensor(out, op, "out", x.dtype, {pairs.shape[0], x.shape[1]});
  require_ids(pairs, op, "pairs", x.shape[0] * k, -1);
  launch("permute_rows", permute_rows_cpu,
         PermuteRowsParams{.x = x.data(),
                           .pairs = pairs.data<int32_t>(),
                           .out = out.data(),
                           .tokens = x.shape[0],
                           .rows = pairs.shape[0],
                           .k = k,
                           .row_bytes = x.shape[1] * dtype_bytes(x.dtype),
                           .x_stride_bytes = x.strides[0] * dtype_bytes(x.dtype)});
}

static void unpermute_rows(TensorView y, TensorView rows, OptionalTensor weights, TensorView out) {
  const char* op = "moe.unpermute";
  require(y.ndim == 2 && y.contiguous_from(1), op, "y", "expected rows of contiguous elements");
  require_tensor(rows, op, "rows", DType::i32, {-1, -1});
  if (weights) require_tensor(*weights, op, "weights", DType::f32, {rows.shape[0], rows.shape[1]});
  require_tensor(out, op, "out", y.dtype, {rows.shape[0], y.shape[1]});
  require_ids(rows, op, "rows", y.shape[0], -1);
  launch("unpermute_rows", unpermute_rows_cpu,
         UnpermuteRowsParams{.y = y.data(),
                             .rows = rows.data<int32_t>(),
                             .weights = data_or_null<float>(weights),
                             .out = out.data(),
                             .tokens = rows.shape[0],
                             .k = rows.shape[1],
                             .num_y = y.shape[0],
                             .width = y.shape[1],
                             .y_stride = y.strides[0],
                             .dtype = y.dtype});
}

static void plan_dispatch(TensorView chosen, TensorView device_of, OptionalTensor source_of, int64_t capacity, TensorView counts, TensorView offsets,
                          TensorView recv_offsets, TensorView tokens, TensorView slots) {
  const char* op = "moe.plan_dispatch";
  require(chosen.ndim == 2 && counts.ndim == 2 && capacity >= 0, op, "experts", "expected [tokens, k]");
  const int64_t num_tokens = chosen.shape[0], k = chosen.shape[1], sources = counts.shape[0], devices = counts.shape[1];
  require_tensor(chosen, op, "experts", DType::i32, {num_tokens, k});
  require_tensor(device_of, op, "device_of", DType::i32, {-1});
  if (source_of) require_tensor(*source_of, op, "source_of", DType::i32, {num_tokens});
  require_tensor(counts, op, "counts", DType::i32, {sources, devices});
  require_tensor(offsets, op, "offsets", DType::i32, {sources * devices + 1});
  require_tensor(recv_offsets, op, "recv_offsets", DType::i32, {devices, sources + 1});
  require_tensor(tokens, op, "tokens", DType::i32, {-1});
  require_tensor(slots, op, "slots", DType::i32, {num_tokens, k});
  require(tokens.shape[0] >= num_tokens * (k < devices ? k : devices), op, "tokens", "too short");
  require_ids(chosen, op, "experts", device_of.shape[0], -1);
  require_ids(device_of, op, "device_of", devices, 0);
  if (source_of) require_ids(*source_of, op, "source_of", sources, 0);
  launch("plan_dispatch", plan_dispatch_cpu,
         PlanDispatchParams{.chosen = chosen.data<int32_t>(),
                            .device_of = device_of.data<int32_t>(),
                            .source_of = data_or_null<int32_t>(source_of),
                            .counts = counts.data<int32_t>(),
                            .offsets = offsets.data<int32_t>(),
                            .recv_offsets = recv_offsets.data<int32_t>(),
                            .tokens = tokens.data<int32_t>(),
                            .slots = slots.data<int32_t>(),
                            .num_tokens = num_tokens,
                            .k = k,
                            .experts = device_of.shape[0],
                            .sources = sources,
                            .devices = devices,
                            .max_sends = tokens.shape[0],
                            .capacity = capacity});
}

static void coactivation(TensorView chosen, TensorView counts) {
  const char* op = "moe.coactivation";
  require_tensor(chosen, op, "experts", DType::i32, {-1, -1});
  require_tensor(counts, op, "counts", DType::i32, {-1, counts.shape[0]});
  require_ids(chosen, op, "experts", counts.shape[0], -1);
  launch("coactivation", coactivation_cpu,
         CoactivationParams{.chosen = chosen.data<int32_t>(),
                            .counts = counts.data<int32_t>(),
                            .num_tokens = chosen.shape[0],
                            .k = chosen.shape[1],
                            .experts = counts.shape[0]});
}

static void count_routes(TensorView counts, TensorView ids, TensorView chosen) {
  const char* op = "moe.count_routes";
  require_tensor(counts, op, "counts", DType::i32, {-1, -1});
  require_tensor(chosen, op, "experts", DType::i32, {-1, -1});
  require_tensor(ids, op, "ids", DType::i32, {chosen.shape[0]});
  require_ids(ids, op, "ids", counts.shape[0], 0);
  require_ids(chosen, op, "experts", counts.shape[1], -1);
  launch("count_routes", count_routes_cpu,
         CountRoutesParams{.counts = counts.data<int32_t>(),
                           .ids = ids.data<int32_t>(),
                           .chosen = chosen.data<int32_t>(),
                           .num_tokens = chosen.shape[0],
                           .k = chosen.shape[1],
                           .vocab = counts.shape[0],
                           .experts = counts.shape[1]});
}

static void grouped_linear(TensorView x, TensorView offsets, TensorView packed, const std::string& format_name, int64_t n, int gate, TensorView out) {
  const char* op = "moe.grouped_linear";
  int found = -1;
  for (int i = 0; i < kNumFormats; ++i)
    if (format_name == kFormatInfo[i].name) found = i;
  require(found >= 0, op, "format", format_name + ", expected a known one");
  const WeightFormat format = static_cast<WeightFormat>(found);
  require(x.ndim == 2 && x.contiguous_from(1) && x.dtype == DType::f32, op, "x", "expected float32 rows of contiguous elements");
  require(packed.ndim == 2 && gate >= 0 && gate <= 2 && n >= 0 && (gate == 0 || n % 32 == 0), op, "packed, gate", "expected [experts, bytes]");
  const int64_t k = x.shape[1], experts = packed.shape[0];
  require(k > 0 && k % format_info(format).unit == 0, op, "k", std::to_string(k) + ", expected a multiple of the format's block");
  require_tensor(packed, op, "packed", DType::u8, {experts, (n + 15) / 16 * group_bytes(format, k)});
  require(reinterpret_cast<uintptr_t>(packed.ptr) % 32 == 0 && packed.shape[1] % 32 == 0, op, "packed", "expected memory aligned to 32 bytes");
  require_tensor(offsets, op, "offsets", DType::i32, {experts + 1});
  require_tensor(out, op, "out", DType::f32, {x.shape[0], gate ? n / 2 : n});
  int64_t least = 0, most = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    const int64_t bound = offsets.data<int32_t>()[e];
    if (bound < least || bound > most)
      require(false, op, "offsets",
              std::to_string(bound) + " at " + std::to_string(e) + ", expected " + std::to_string(least) + ".." + std::to_string(most));
    least = bound;
    most = x.shape[0];
  }
  launch("grouped_linear", grouped_linear_cpu,
         GroupedLinearParams{.all = {.x = x.data<float>(),
                                     .packed = packed.data<uint8_t>(),
                                     .bias = nullptr,
                                     .residual = nullptr,
                                     .out = out.data<float>(),
                                     .num_rows = nullptr,
                                     .rows = x.shape[0],
                                     .n = n,
                                     .k = k,
                                     .x_stride = x.strides[0],
                                     .residual_stride = 0,
                                     .out_stride = out.strides[0],
                                     .format = format,
                                     .gate = static_cast<Gate>(gate)},
                             .offsets = offsets.data<int32_t>(),
                             .experts = experts,
                             .packed_bytes = packed.shape[1]});
}

static py::tuple placed(TensorView counts, int64_t devices, double slack, int starts, uint64_t seed) {
  const char* op = "moe.place_experts";
  require_tensor(counts, op, "counts", DType::i32, {-1, -1});
  require(devices >= 1 && counts.shape[1] % devices == 0 && starts >= 1, op, "devices", "expected a divisor of the experts");
  Placement p;
  {
    py::gil_scoped_release nogil;
    p = place_experts(counts.data<int32_t>(), counts.shape[0], counts.shape[1], devices, slack, starts, seed);
  }
  return py::make_tuple(p.expert_device, p.token_device, p.local);
}

static int64_t shuffled(TensorView wanted, OptionalTensor confidence, int64_t devices, TensorView order) {
  const char* op = "moe.shuffle_rows";
  require_tensor(wanted, op, "wanted", DType::i32, {-1});
  require_tensor(order, op, "order", DType::i32, {wanted.shape[0]});
  if (confidence) require_tensor(*confidence, op, "confidence", DType::f32, {wanted.shape[0]});
  require(devices >= 1, op, "devices", "expected at least 1");
  require_ids(wanted, op, "wanted", devices, -1);
  py::gil_scoped_release nogil;
  int64_t moved = 0;
  const std::vector<int32_t> found = shuffle_rows(wanted.data<int32_t>(), data_or_null<float>(confidence), wanted.shape[0], devices, &moved);
  std::copy(found.begin(), found.end(), order.data<int32_t>());
  return moved;
}

static void require_square(const std::vector<double>& values, int64_t rows, int64_t columns, int64_t devices, const char* op) {
  require(static_cast<int64_t>(values.size()) == rows * columns && devices >= 1 && rows % devices == 0, op, "devices", "expected a divisor");
}

STRETTO_BIND(moe) {
  m.def("topk_route", &topk_route);
  m.def("sort_by_expert", &sort_by_expert);
  m.def("permute_rows", &permute_rows);
  m.def("unpermute_rows", &unpermute_rows);
  m.def("plan_dispatch", &plan_dispatch);
  m.def("coactivation", &coactivation);
  m.def("count_routes", &count_routes);
  m.def("grouped_linear", &grouped_linear);
  m.def("balanced_assignment", [](const std::vector<double>& score, int64_t items, int64_t devices) {
    require_square(score, items, devices, devices, "moe.balanced_assignment");
    py::gil_scoped_release nogil;
    return balanced_assignment(score, items, devices);
  });
  m.def("group_experts", [](const std::vector<double>& affinity, int64_t experts, int64_t devices, int starts, uint64_t seed) {
    require_square(affinity, experts, experts, devices, "moe.group_experts");
    py::gil_scoped_release nogil;
    return group_experts(affinity, experts, devices, starts, seed);
  });
  m.def("place_experts", &placed);
  m.def("shuffle_rows", &shuffled);
}

}  // namespace stretto
