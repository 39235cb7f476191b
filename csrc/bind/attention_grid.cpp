#include <array>

#include "bind/attention_rows.h"
#include "kernels/attention/attention3d.h"

namespace stretto {
namespace {

constexpr const char* kOp = "attention.attention3d";

using Sizes = std::array<int64_t, 3>;

// frames, rows, columns of the queries; frames of the keys; window 0: all.
void attention3d(TensorView q, TensorView k, TensorView v, Sizes grid, int64_t k_frames, Sizes window, Sizes stride, bool causal, float scale,
                 float softcap, OptionalTensor frames, OptionalTensor rotation, TensorView out, TensorView lse) {
  Attention3dParams p{};
  const int64_t batch = q.shape[0];
  // A pool of frames has one batch entry, whatever the queries have: k and v are looked at as if each entry had all of it.
  TensorView keys = k, values = v;
  if (frames) {
    require(k.ndim == 4 && v.ndim == 4 && k.shape[0] == 1 && v.shape[0] == 1, kOp, "k, v", "expected a pool with one batch entry beside frames");
    keys.shape[0] = values.shape[0] = batch;
  }
  p.t = attention_tensors(kOp, q, keys, values, out, lse, scale, softcap);
  int64_t places = 1;
  for (int i = 0; i < 3; ++i) {
    const int64_t n = i == 0 ? k_frames : grid[i];
    require(grid[i] >= 0 && n >= grid[i] && n < (int64_t(1) << 31), kOp, "grid", std::to_string(grid[i]) + " along axis " + std::to_string(i));
    require(
        window[i] >= 0 && window[i] <= n && stride[i] >= 1 && (window[i] == 0 || stride[i] <= window[i]), kOp, "window",
        std::to_string(window[i]) + " with stride " + std::to_string(stride[i]) + " along axis " + std::to_string(i) + " of " + std::to_string(n));
    places *= grid[i];
  }
  const int64_t frame = grid[1] * grid[2];
  require(places == p.t.q_len, kOp, "q", std::to_string(p.t.q_len) + " rows, expected " + std::to_string(places));
  require(frame == 0 || k_frames < (int64_t(1) << 31) / frame, kOp, "grid", "more than 2^31 keys");
  if (!frames) require(p.t.k_len == k_frames * frame, kOp, "k", std::to_string(p.t.k_len) + " rows, expected " + std::to_string(k_frames * frame));
  if (frames) {
    require_tensor(*frames, kOp, "frames", DType::i32, {batch, k_frames});
    p.frame_index = frames->data<int32_t>();
    for (int64_t i = 0; i < batch * k_frames; ++i)
      require(p.frame_index[i] >= 0 && (int64_t(p.frame_index[i]) + 1) * frame <= p.t.k_len, kOp, "frames",
              std::to_string(p.frame_index[i]) + " at " + std::to_string(i) + ", expected a frame of the pool");
  }
  if (rotation) require_tensor(*rotation, kOp, "rope", DType::f32, {k_frames * frame, p.t.head_dim});
  require(!rotation || p.t.head_dim % 2 == 0, kOp, "rope", "expected an even head_dim");
  p.rotation = data_or_null<float>(rotation);
  p.frames = {grid[0], k_frames, window[0], stride[0], causal};
  p.rows = {grid[1], grid[1], window[1], stride[1], false};
  p.columns = {grid[2], grid[2], window[2], stride[2], false};
  launch("attention3d", attention3d_cpu, p);
}

}  // namespace

STRETTO_BIND(attention_grid) { m.def("attention3d", &attention3d); }

}  // namespace stretto
