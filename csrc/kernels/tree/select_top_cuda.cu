#include "kernels/sampling/select.cuh"
#include "kernels/tree/select_top.h"

namespace stretto {
namespace {

constexpr int kBlock = 256;

struct Shared {
  CutShared cut;
  int taken[kBlock / kWarp];
};

// A block a sequence. A candidate's key is the least score on its path, found by walking up: trees are shallow, and nothing has to be stored.
__global__ void __launch_bounds__(kBlock) select_top_kernel(const SelectTopParams p) {
  Shared& s = *shared_memory<Shared>();
  const int64_t b = blockIdx.x, count = p.candidates;
  const float* scores = p.scores + b * count;
  const int32_t* parent = p.parent + b * count;
  int32_t* out = p.out + b * p.keep;
  for (int64_t i = threadIdx.x; i < p.keep; i += kBlock) out[i] = -1;
  bool ok = true;
  for (int64_t i = threadIdx.x; i < count; i += kBlock) ok &= i == 0 ? parent[0] == -1 : parent[i] >= -1 && parent[i] < i;
  if (!__syncthreads_and(ok)) return;

  const float nothing = -__int_as_float(0x7f800000);
  const auto item = [&](int64_t i, uint32_t& key) -> Weight {
    float least = -nothing;
    int64_t node = i;
    for (; node > 0; node = parent[node]) {
      least = scores[node] < least ? scores[node] : scores[node] >= least ? least : nothing;  // NaN compares false twice
    }
    if (node < 0 || i == 0 || least == nothing) return 0;  // unused, the root (always kept), or never kept
    key = ordered_key(least);
    return 1;
  };
  DeviceCut cut{0xffffffffu, -1};
  if (p.keep > 1) cut = find_cut<kBlock>(count, static_cast<Weight>(p.keep - 1), item, s.cut);

  int64_t written = 0;
  for (int64_t first = 0; first < count; first += kBlock) {  // kept ones in rising order
    const int64_t i = first + threadIdx.x;
    uint32_t key = 0;
    const bool keep = i == 0 || (p.keep > 1 && i < count && item(i, key) && cut.keeps(key, i));
    const unsigned votes = __ballot_sync(kAllLanes, keep);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (lane == 0) s.taken[warp] = __popc(votes);
    __syncthreads();
    int64_t at = written + __popc(votes & ((1u << lane) - 1)), all = written;
    for (int w = 0; w < kBlock / kWarp; ++w) {
      if (w < warp) at += s.taken[w];
      all += s.taken[w];
    }
    if (keep) out[at] = static_cast<int32_t>(i);
    written = all;
    __syncthreads();
  }
}

}  // namespace

void select_top_cuda(const SelectTopParams& p, cudaStream_t stream) {
  if (p.batch == 0) return;
  launch_kernel<select_top_kernel>({.grid = unsigned(p.batch), .block = kBlock, .smem_bytes = sizeof(Shared), .stream = stream}, p);
}

STRETTO_CUDA_KERNEL(select_top, SelectTopParams)

}  // namespace stretto
