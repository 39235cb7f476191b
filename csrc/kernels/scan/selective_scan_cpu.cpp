#include "kernels/scan/selective_scan.h"

#include "common/parallel.h"
#include "kernels/scan/scan_rows.h"
#include "kernels/scan/selective_scan_tile.h"

namespace stretto::STRETTO_ISA {
namespace {

// Channels are cut into runs of up to kRunBlocks blocks that stay in one group and share its B and C; a task is a run of a sequence.
constexpr int64_t kRunBlocks = 4;  // 64 channels: whole cache lines of each row, in any dtype
struct ScanRuns {
  int64_t group_width, runs_per_group, count;
  explicit ScanRuns(const SelectiveScanInputs& in) {
    group_width = in.groups ? in.channels / in.groups : 0;
    runs_per_group = (group_width + kRunBlocks * kLanes - 1) / (kRunBlocks * kLanes);
    count = runs_per_group * in.groups;
  }
  int64_t group(int64_t run) const { return run / runs_per_group; }
  int64_t first(int64_t run) const { return group(run) * group_width + run % runs_per_group * kRunBlocks * kLanes; }
  int64_t width(int64_t run) const {
    const int64_t left = group_width - run % runs_per_group * kRunBlocks * kLanes;
    return left < kRunBlocks * kLanes ? left : kRunBlocks * kLanes;
  }
};

// A run's working memory, from thread_scratch.
struct ScanRun {
  int64_t group, blocks;
  ScanBlock block[kRunBlocks];
  float* h[kRunBlocks];  // [states][16] each
  float *b, *c;          // [kTileRows][states]
  ScanTile tile;
};

ScanRun& scan_run(const SelectiveScanInputs& in, const ScanRuns& runs, int64_t run) {
  const int64_t tile = in.states * kLanes, head = (static_cast<int64_t>(sizeof(ScanRun)) + 63) / 64 * 64,
                vectors = (kTileRows * in.states + 15) / 16 * 16;
  char* memory = static_cast<char*>(thread_scratch(0, head + 4 * (2 * kRunBlocks * tile + 2 * vectors)));
  ScanRun& r = *reinterpret_cast<ScanRun*>(memory);
  float* p = reinterpret_cast<float*>(memory + head);
  const int64_t first = runs.first(run), width = runs.width(run);
  r.group = runs.group(run);
  r.blocks = (width + kLanes - 1) / kLanes;
  for (int64_t k = 0; k < r.blocks; ++k) {
    const int64_t left = width - k * kLanes;
    r.h[k] = p + 2 * k * tile;
    r.block[k] = scan_block(in, first + k * kLanes, left < kLanes ? static_cast<int>(left) : kLanes, p + (2 * k + 1) * tile);
  }
  r.b = p + 2 * kRunBlocks * tile;
  r.c = r.b + vectors;
  return r;
}

// `count` rows from the states in r.h, which advance; outputs go to y where kOutput.
template <class T, bool kOutput> void scan_sequence(const SelectiveScanInputs& in, ScanRun& r, ScanRows rows, int64_t count, void* y,
                                                    int64_t y_stride) {
  for (int64_t row = 0; row < count; row += kTileRows) {
    const int64_t some = count - row < kTileRows ? count - row : kTileRows;
    scan_vectors<T>(r.b, in.b, in.b_stride, r.group, in.states, rows, row, some);
    if (kOutput) scan_vectors<T>(r.c, in.c, in.c_stride, r.group, in.states, rows, row, some);
    for (int64_t k = 0; k < r.blocks; ++k) {
      const bool in_range = scan_inputs<T>(in, r.block[k], rows, row, some, r.tile);
      scan_tile<kOutput>(r.h[k], r.block[k].a, r.tile, r.b, r.c, some, in.states, in_range);
      if (kOutput) scan_outputs<T>(in, r.block[k], rows, row, some, r.tile, y, y_stride);
    }
  }
}

// How many tasks go to a thread together: about 10 us of work, a row of a run being 0.4 us of exponentials at 16 states.
int64_t tasks_together(const SelectiveScanInputs& in, int64_t batch) { return 400 / ((in.tokens / (batch + 1) + 1) * (in.states + 4)) + 1; }

void load_state(const SelectiveScanInputs& in, ScanRun& r, const float* state, const int64_t* strides) {  // strides of channel and state
  for (int64_t k = 0; k < r.blocks; ++k) {
    if (state) load_columns(r.h[k], state + r.block[k].first * strides[0], strides[0], strides[1], r.block[k].lanes, in.states);
    else std::memset(r.h[k], 0, static_cast<size_t>(in.states) * kLanes * 4);
  }
}

void store_state(const SelectiveScanInputs& in, const ScanRun& r, float* state, const int64_t* strides) {
  for (int64_t k = 0; k < r.blocks; ++k)
    store_columns(state + r.block[k].first * strides[0], r.h[k], strides[0], strides[1], r.block[k].lanes, in.states);
}

template <class T> void forward_run(const SelectiveScanParams& p, const ScanRuns& runs, int64_t b, int64_t run) {
  ScanRun& r = scan_run(p.in, runs, run);
  load_state(p.in, r, p.h0 ? p.h0 + b * p.h0_strides[0] : nullptr, p.h0_strides + 1);
  scan_sequence<T, true>(p.in, r, {p.cu_seqlens[b], nullptr}, p.cu_seqlens[b + 1] - p.cu_seqlens[b], p.y, p.y_stride);
  const int64_t dense[2] = {p.in.states, 1};
  store_state(p.in, r, p.h_last + b * p.in.channels * p.in.states, dense);
}

// A tree: the state of each row is kept for its children.
template <class T> void step_tree(const SelectiveScanStepParams& p, ScanRun& r, RowRange rows) {
  const SelectiveScanInputs& in = p.in;
  const int64_t m = rows.end - rows.begin, tile = in.states * kLanes;
  float* after = static_cast<float*>(thread_scratch(1, m * r.blocks * tile * 4));
  float* before[kRunBlocks];
  for (int64_t k = 0; k < r.blocks; ++k) before[k] = r.h[k];
  for (int64_t i = 0; i < m; ++i) {
    const int64_t parent = parent_of(p.parent, rows.begin, i);
    for (int64_t k = 0; k < r.blocks; ++k) {
      r.h[k] = after + (i * r.blocks + k) * tile;
      std::memcpy(r.h[k], parent < 0 ? before[k] : after + (parent * r.blocks + k) * tile, static_cast<size_t>(tile) * 4);
    }
    scan_sequence<T, true>(in, r, {rows.begin + i, nullptr}, 1, p.y, p.y_stride);
  }
}

template <class T> void step_run(const SelectiveScanStepParams& p, const ScanRuns& runs, int64_t b, int64_t run) {
  const RowRange rows = rows_of(p.cu_seqlens, b, p.in.tokens);
  const int64_t slot = slot_of(p.slots, b, p.num_slots);
  if (slot < 0) {
    for (int64_t t = rows.begin; t < rows.end; ++t)
      std::memset(static_cast<T*>(p.y) + t * p.y_stride + runs.first(run), 0, static_cast<size_t>(runs.width(run)) * sizeof(T));
    return;
  }
  if (rows.begin == rows.end) return;
  ScanRun& r = scan_run(p.in, runs, run);
  float* state = p.state + slot * p.state_strides[0];
  load_state(p.in, r, state, p.state_strides + 1);
  if (p.parent) return step_tree<T>(p, r, rows);
  scan_sequence<T, true>(p.in, r, {rows.begin, nullptr}, rows.end - rows.begin, p.y, p.y_stride);
  if (p.update) store_state(p.in, r, state, p.state_strides + 1);
}

template <class T> void replay_run(const SelectiveScanReplayParams& p, const ScanRuns& runs, int64_t b, int64_t run) {
  const int64_t slot = slot_of(p.slots, b, p.num_slots), n = replay_count(p.rows, p.n, b, p.max_rows, p.in.tokens);
  if (slot < 0 || n == 0) return;
  ScanRun& r = scan_run(p.in, runs, run);
  float* state = p.state + slot * p.state_strides[0];
  load_state(p.in, r, state, p.state_strides + 1);
  scan_sequence<T, false>(p.in, r, {0, p.rows + b * p.max_rows}, n, nullptr, 0);
  store_state(p.in, r, state, p.state_strides + 1);
}

template <class F> void for_runs(const SelectiveScanInputs& in, int64_t batch, const F& f) {
  const ScanRuns runs(in);
  if (runs.count == 0) return;
  dispatch_float(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, batch * runs.count, even_grain(batch * runs.count, tasks_together(in, batch)),
                 [&](int64_t task) { f(TypeTag<T>{}, runs, task / runs.count, task % runs.count); });
  });
}

}  // namespace

void selective_scan(const SelectiveScanParams& p) {
  for_runs(p.in, p.batch,
           [&](auto tag, const ScanRuns& runs, int64_t b, int64_t run) { forward_run<typename decltype(tag)::type>(p, runs, b, run); });
}

void selective_scan_step(const SelectiveScanStepParams& p) {
  for_runs(p.in, p.batch, [&](auto tag, const ScanRuns& runs, int64_t b, int64_t run) { step_run<typename decltype(tag)::type>(p, runs, b, run); });
}

void selective_scan_replay(const SelectiveScanReplayParams& p) {
  for_runs(p.in, p.batch, [&](auto tag, const ScanRuns& runs, int64_t b, int64_t run) { replay_run<typename decltype(tag)::type>(p, runs, b, run); });
}

}  // namespace stretto::STRETTO_ISA
