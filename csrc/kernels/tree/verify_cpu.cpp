#include "kernels/tree/verify.h"

#include "common/parallel.h"
#include "common/philox.h"
#include "kernels/sampling/inverse_cdf.h"
#include "kernels/tree/tree.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr double kRounding = 1e-12;

// The rows of one sequence's tree.
struct Tree {
  const VerifyParams& p;
  int64_t b;
  const int32_t *tokens, *parent;
  int32_t n;
  double *r, *q;  // [vocab] each: what is left of p and of q at the current node

  const float* p_row(int64_t node) const { return p.p + (b * p.nodes + node) * p.vocab; }
  const float* q_row(int64_t node) const { return p.q + (b * p.nodes + node) * p.vocab; }
  double uniform(int32_t depth, Purpose purpose, uint32_t index) const {
    const int32_t position = static_cast<int32_t>(static_cast<uint32_t>(p.pos[b]) + static_cast<uint32_t>(depth));
    return uniform53(noise_block(p.seed[b], p.lineage[b], position, purpose, index));
  }

  // The accepted child of node, 0 if there is none (then *bonus is drawn), -1 where a child has no weight in q.
  int32_t step(int32_t node, int32_t depth, int32_t* bonus) {
    const int64_t vocab = p.vocab;
    const float *target = p_row(node), *draft = q_row(node);
    const double target_sum = row_sum(target, vocab);
    double r_sum = target_sum, q_sum = 0;
    bool r_is_p = true, q_is_row = true;
    uint32_t k = 0;
    *bonus = -1;
    for (int32_t i = node + 1; i < n; ++i) {
      if (parent[i] != node) continue;
      const int64_t x = tokens[i];
      if (x < 0 || x >= vocab) return -1;
      if (k == 0) q_sum = row_sum(draft, vocab);
      const double q_x = q_is_row ? static_cast<double>(draft[x]) : q[x];
      if (!(q_sum > 0) || !(q_x > 0)) return -1;
      if (!(r_sum > 0)) return 0;  // the target has no law here: stop without a token
      const double r_x = r_is_p ? static_cast<double>(target[x]) : r[x];
      if (uniform(depth, Purpose::accept, k++) * q_x * r_sum < r_x * q_sum) return i;
      for (int64_t v = 0; v < vocab; ++v) {
        const double left = (r_is_p ? static_cast<double>(target[v]) : r[v]) / r_sum - (q_is_row ? static_cast<double>(draft[v]) : q[v]) / q_sum;
        r[v] = left > 0 ? left : 0;
      }
      r_is_p = false;
      r_sum = row_sum(r, vocab);
      if (!(r_sum > kRounding)) r_is_p = true, r_sum = target_sum;
      if (!p.replacement) {
        if (q_is_row)
          for (int64_t v = 0; v < vocab; ++v) q[v] = static_cast<double>(draft[v]);
        q_is_row = false;
        q[x] = 0;
        q_sum = row_sum(q, vocab);
      }
    }
    if (!(r_sum > 0)) return 0;
    const double u = uniform(depth, Purpose::token, 0);
    *bonus = r_is_p ? inverse_cdf(target, vocab, r_sum, u) : inverse_cdf(r, vocab, r_sum, u);
    return 0;
  }
};

}  // namespace

void verify(const VerifyParams& p) {
  parallel_for(0, p.batch, 1, [&](int64_t b) {
    int32_t* path = p.path + b * p.nodes;
    for (int64_t i = 0; i < p.nodes; ++i) path[i] = -1;
    p.accepted[b] = p.bonus[b] = -1;
    double* scratch = static_cast<double*>(thread_scratch(0, 2 * p.vocab * static_cast<int64_t>(sizeof(double))));
    Tree tree{p, b, p.tokens + b * p.nodes, p.parent + b * p.nodes, p.n[b], scratch, scratch + p.vocab};
    if (!valid_tree(tree.parent, tree.n, p.nodes)) return;
    p.accepted[b] = 0;
    if (tree.n == 0) return;
    path[0] = 0;
    for (int32_t node = 0, depth = 0;; ++depth) {
      node = tree.step(node, depth, p.bonus + b);
      if (node == 0) return;
      if (node < 0) {
        for (int64_t i = 0; i < p.nodes; ++i) path[i] = -1;
        p.accepted[b] = p.bonus[b] = -1;
        return;
      }
      path[depth + 1] = node;
      p.accepted[b] = depth + 1;
    }
  });
}

}  // namespace stretto::STRETTO_ISA
