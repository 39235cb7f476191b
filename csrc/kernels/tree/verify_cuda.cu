#include "kernels/tree/verify.h"

#include "common/philox.h"
#include "kernels/sampling/inverse_cdf.cuh"
#include "kernels/tree/tree.cuh"

namespace stretto {
namespace {

constexpr int kBlock = 512;
constexpr double kRounding = 1e-12;

struct Refusal {  // what one refused child did to the residual
  double r_sum, q_sum;
  int32_t token;
};

struct Shared {
  RunSums<kBlock> sums;
  Refusal refusals[1];  // [nodes]: a node has fewer children than the tree has nodes
};

// What is left of p and q at a node is not stored: a refusal is two scalars and a token, and a weight is found again from p, q and the refusals
// before it, in the same operations.
struct Residual {
  const float *p, *q;
  const Refusal* refusals;
  int first, count;  // those that count: after a residual of nothing but rounding, p takes its place
  bool replacement;

  __device__ __forceinline__ double q_at(int64_t v, int before) const {
    if (!replacement)
      for (int j = 0; j < before; ++j)
        if (refusals[j].token == v) return 0;
    return static_cast<double>(q[v]);
  }
  __device__ __forceinline__ double r_at(int64_t v) const {
    double r = static_cast<double>(p[v]);
    for (int j = first; j < count; ++j) {
      const double left = r / refusals[j].r_sum - q_at(v, j) / refusals[j].q_sum;
      r = left > 0 ? left : 0;
    }
    return r;
  }
};

__device__ __forceinline__ double uniform(const VerifyParams& p, int64_t b, int32_t depth, Purpose purpose, uint32_t index) {
  const int32_t position = static_cast<int32_t>(static_cast<uint32_t>(p.pos[b]) + static_cast<uint32_t>(depth));
  return uniform53(noise_block(p.seed[b], p.lineage[b], position, purpose, index));
}

// The accepted child of node, 0 if there is none (then bonus is drawn), -1 where a child has no weight in q. The whole block decides alike.
__device__ __forceinline__ int32_t step(const VerifyParams& p, int64_t b, int32_t node, int32_t depth, int32_t& bonus, Shared& s) {
  const int32_t *tokens = p.tokens + b * p.nodes, *parent = p.parent + b * p.nodes, n = p.n[b];
  const int64_t row = (b * p.nodes + node) * p.vocab;
  Residual left{p.p + row, p.q + row, s.refusals, 0, 0, p.replacement};
  const auto r_at = [&](int64_t v) { return left.r_at(v); };
  const auto q_at = [&](int64_t v) { return left.q_at(v, left.count); };
  double q_sum = 0;
  const double target_sum = run_sums(p.vocab, r_at, s.sums);
  double r_sum = target_sum;
  bonus = -1;
  for (int32_t i = node + 1; i < n; ++i) {
    if (parent[i] != node) continue;
    const int64_t x = tokens[i];
    if (x < 0 || x >= p.vocab) return -1;
    if (left.count == 0 || !p.replacement) q_sum = run_sums(p.vocab, q_at, s.sums);
    const double q_x = q_at(x);
    if (!(q_sum > 0) || !(q_x > 0)) return -1;
    if (!(r_sum > 0)) return 0;  // the target has no law here: stop without a token
    if (uniform(p, b, depth, Purpose::accept, static_cast<uint32_t>(left.count)) * q_x * r_sum < r_at(x) * q_sum) return i;
    __syncthreads();
    if (threadIdx.x == 0) s.refusals[left.count] = {r_sum, q_sum, static_cast<int32_t>(x)};
    __syncthreads();
    ++left.count;
    r_sum = run_sums(p.vocab, r_at, s.sums);
    if (!(r_sum > kRounding)) left.first = left.count, r_sum = target_sum;
  }
  if (!(r_sum > 0)) return 0;
  const double total = run_sums(p.vocab, r_at, s.sums);  // the sums of its runs, once more: q's have taken their place
  bonus = inverse_cdf(p.vocab, total, uniform(p, b, depth, Purpose::token, 0), r_at, s.sums);
  return 0;
}

__global__ void __launch_bounds__(kBlock, 1) verify_kernel(const VerifyParams p) {
  Shared& s = *shared_memory<Shared>();
  const int64_t b = blockIdx.x;
  int32_t* path = p.path + b * p.nodes;
  const bool valid = valid_tree_block(p.parent + b * p.nodes, p.n[b], p.nodes);
  int32_t node = valid ? 0 : -1, accepted = 0, bonus = -1, length = 0;
  if (valid && p.n[b] > 0) {
    for (length = 1;; ++length) {
      if (threadIdx.x == 0) path[length - 1] = node;
      const int32_t child = step(p, b, node, length - 1, bonus, s);
      if (child <= 0) {
        node = child;
        break;
      }
      node = child;
    }
    accepted = length - 1;
  }
  const bool failed = node < 0;
  for (int64_t i = failed ? threadIdx.x : length + threadIdx.x; i < p.nodes; i += kBlock) path[i] = -1;
  if (threadIdx.x == 0) {
    p.accepted[b] = failed ? -1 : accepted;
    p.bonus[b] = failed ? -1 : bonus;
  }
}

}  // namespace

void verify_cuda(const VerifyParams& p, cudaStream_t stream) {
  if (p.batch == 0) return;
  const size_t smem = sizeof(Shared) + static_cast<size_t>(p.nodes) * sizeof(Refusal);
  launch_kernel<verify_kernel>({.grid = unsigned(p.batch), .block = kBlock, .smem_bytes = smem, .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(verify, VerifyParams)

}  // namespace stretto
