// Where experts live and which device a token should be on, from counts of what was routed where. Runs at planning time, not in a step.
// Everything is deterministic: ties go to the lowest id, and random starts come from the seed. Source: arXiv 2503.04398.
#pragma once
#include <cstdint>
#include <vector>

namespace stretto {

// device[i] for each item, `items / devices` items on each, with the largest sum of score[i * devices + device[i]]. Exact, by
// shortest augmenting paths: O(items^2 devices + items devices^3). `devices` divides `items`.
std::vector<int32_t> balanced_assignment(const std::vector<double>& score, int64_t items, int64_t devices);

// Groups of equal size with much affinity inside: the best of `starts` greedy or random starts, each improved by swaps of two experts
// until none helps. affinity: [experts, experts], symmetric; the diagonal does not count.
std::vector<int32_t> group_experts(const std::vector<double>& affinity, int64_t experts, int64_t devices, int starts, uint64_t seed);

struct Placement {
  std::vector<int32_t> expert_device, token_device;  // token_device: -1 for a token id that was never seen
  double local = 0;                                  // sum of counts whose expert is on the token's device
};

// Experts and token ids placed together, to maximise `local`: in turn the best device of each token, under a cap of (1 + slack) / devices
// of all counts, and the best balanced placement of the experts for those tokens, while that improves. counts: [vocab, experts], >= 0.
Placement place_experts(const int32_t* counts, int64_t vocab, int64_t experts, int64_t devices, double slack, int starts, uint64_t seed);

// A permutation that cuts rows into `devices` slices of equal size (the first rows % devices have one more), rows that want a device in
// its slice as far as there is room. Where more want one, those of lowest confidence (later ones among equals) go to the slices with most
// room. Within a slice rows keep their order. wanted: [rows], each 0 to devices - 1 or -1 for none. moved: rows not where they want to be.
std::vector<int32_t> shuffle_rows(const int32_t* wanted, const float* confidence, int64_t rows, int64_t devices, int64_t* moved);

}  // namespace stretto
