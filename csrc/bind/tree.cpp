#include <utility>

#include "bind/bind.h"
#include "kernels/tree/ancestor_mask.h"
#include "kernels/tree/select_top.h"
#include "kernels/tree/verify.h"
#include "kernels/tree/walk.h"

namespace stretto {
namespace {

void ancestor_mask(TensorView parent, TensorView n, TensorView mask, TensorView depth) {
  constexpr const char* op = "tree.ancestor_mask";
  require_tensor(parent, op, "parent", DType::i32, {-1, -1});
  const int64_t batch = parent.shape[0], nodes = parent.shape[1], words = (nodes + 63) / 64;
  require_tensor(n, op, "n", DType::i32, {batch});
  require_tensor(mask, op, "mask", DType::i64, {batch, nodes, words});
  require_tensor(depth, op, "depth", DType::i32, {batch, nodes});
  launch("ancestor_mask", ancestor_mask_cpu,
         AncestorMaskParams{.parent = parent.data<int32_t>(),
                            .n = n.data<int32_t>(),
                            .mask = mask.data<uint64_t>(),
                            .depth = depth.data<int32_t>(),
                            .batch = batch,
                            .nodes = nodes,
                            .words = words},
         parent);
}

void walk(TensorView next, TensorView tokens, TensorView parent, TensorView n, TensorView path, TensorView accepted, TensorView bonus) {
  constexpr const char* op = "tree.walk";
  require_tensor(next, op, "next", DType::i32, {-1, -1});
  const int64_t batch = next.shape[0], nodes = next.shape[1];
  require_tensor(tokens, op, "tokens", DType::i32, {batch, nodes});
  require_tensor(parent, op, "parent", DType::i32, {batch, nodes});
  require_tensor(n, op, "n", DType::i32, {batch});
  require_tensor(path, op, "path", DType::i32, {batch, nodes});
  require_tensor(accepted, op, "accepted", DType::i32, {batch});
  require_tensor(bonus, op, "bonus", DType::i32, {batch});
  launch("walk", walk_cpu,
         WalkParams{.next = next.data<int32_t>(),
                    .tokens = tokens.data<int32_t>(),
                    .parent = parent.data<int32_t>(),
                    .n = n.data<int32_t>(),
                    .path = path.data<int32_t>(),
                    .accepted = accepted.data<int32_t>(),
                    .bonus = bonus.data<int32_t>(),
                    .batch = batch,
                    .nodes = nodes},
         next);
}

void require_laws(const TensorView& t, const char* op, const char* argument, int64_t batch, int64_t nodes, int64_t vocab) {
  require(t.dtype == DType::f32 && t.ndim == 3 && t.shape[0] == batch && t.shape[1] == nodes && t.shape[2] == vocab && t.contiguous(), op, argument,
          "expected contiguous float32 [batch, nodes, vocab]");
}

void verify(TensorView p, TensorView q, TensorView tokens, TensorView parent, TensorView n, TensorView seed, TensorView lineage, TensorView pos,
            bool replacement, TensorView path, TensorView accepted, TensorView bonus) {
  constexpr const char* op = "tree.verify";
  require(p.ndim == 3, op, "p", "expected [batch, nodes, vocab]");
  const int64_t batch = p.shape[0], nodes = p.shape[1], vocab = p.shape[2];
  require_laws(p, op, "p", batch, nodes, vocab);
  require_laws(q, op, "q", batch, nodes, vocab);
  for (auto [t, name] : {std::pair{&tokens, "tokens"}, {&parent, "parent"}, {&path, "path"}})
    require_tensor(*t, op, name, DType::i32, {batch, nodes});
  for (auto [t, name] : {std::pair{&n, "n"}, {&pos, "pos"}, {&accepted, "accepted"}, {&bonus, "bonus"}})
    require_tensor(*t, op, name, DType::i32, {batch});
  for (auto [t, name] : {std::pair{&seed, "seed"}, {&lineage, "lineage"}}) require_tensor(*t, op, name, DType::i64, {batch});
  launch("verify", verify_cpu,
         VerifyParams{.p = p.data<float>(),
                      .q = q.data<float>(),
                      .tokens = tokens.data<int32_t>(),
                      .parent = parent.data<int32_t>(),
                      .n = n.data<int32_t>(),
                      .seed = seed.data<int64_t>(),
                      .lineage = lineage.data<int64_t>(),
                      .pos = pos.data<int32_t>(),
                      .path = path.data<int32_t>(),
                      .accepted = accepted.data<int32_t>(),
                      .bonus = bonus.data<int32_t>(),
                      .batch = batch,
                      .nodes = nodes,
                      .vocab = vocab,
                      .replacement = replacement},
         p);
}

void select_top(TensorView scores, TensorView parent, TensorView out) {
  constexpr const char* op = "tree.select_top";
  require_tensor(scores, op, "scores", DType::f32, {-1, -1});
  const int64_t batch = scores.shape[0], candidates = scores.shape[1];
  require_tensor(parent, op, "parent", DType::i32, {batch, candidates});
  require_tensor(out, op, "out", DType::i32, {batch, -1});
  require(out.shape[1] >= 1 && candidates < (int64_t(1) << 30), op, "N", "expected at least 1, and less than 2^30 candidates");
  launch("select_top", select_top_cpu,
         SelectTopParams{.scores = scores.data<float>(),
                         .parent = parent.data<int32_t>(),
                         .out = out.data<int32_t>(),
                         .batch = batch,
                         .candidates = candidates,
                         .keep = out.shape[1]},
         scores);
}

}  // namespace

STRETTO_BIND(tree) {
  m.def("ancestor_mask", &ancestor_mask);
  m.def("walk", &walk);
  m.def("verify", &verify);
  m.def("select_top", &select_top);
}

}  // namespace stretto
