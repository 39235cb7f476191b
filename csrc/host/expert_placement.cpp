#include "host/expert_placement.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace stretto {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<int32_t> random_balanced(int64_t items, int64_t devices, std::mt19937_64& random) {
  std::vector<int32_t> device(static_cast<size_t>(items));
  for (int64_t i = 0; i < items; ++i) device[i] = static_cast<int32_t>(i % devices);
  for (int64_t i = items - 1; i > 0; --i) std::swap(device[i], device[random() % static_cast<uint64_t>(i + 1)]);  // the same on every platform
  return device;
}

// Groups filled one after the other with the expert of most affinity to what is inside; the first of a group is the busiest one left.
std::vector<int32_t> greedy_groups(const std::vector<double>& affinity, int64_t experts, int64_t devices) {
  std::vector<int32_t> group(static_cast<size_t>(experts), -1);
  for (int64_t d = 0; d < devices; ++d) {
    std::vector<double> pull(static_cast<size_t>(experts), 0.0);
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t x = 0; x < experts; ++x)
        if (x != e && group[x] < 0) pull[e] += affinity[e * experts + x];
    for (int64_t n = 0; n < experts / devices; ++n) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts; ++e)
        if (group[e] < 0 && (best < 0 || pull[e] > pull[best])) best = e;
      group[best] = static_cast<int32_t>(d);
      if (n == 0) std::fill(pull.begin(), pull.end(), 0.0);
      for (int64_t e = 0; e < experts; ++e) pull[e] += affinity[e * experts + best];
    }
  }
  return group;
}

// Swaps the first pair that helps, until no pair does. Returns the affinity inside groups.
double improve_by_swaps(const std::vector<double>& affinity, int64_t experts, int64_t devices, std::vector<int32_t>& group) {
  std::vector<double> to(static_cast<size_t>(experts * devices), 0.0);  // affinity of an expert to the others of each group
  double largest = 0.0;
  for (int64_t e = 0; e < experts; ++e)
    for (int64_t x = 0; x < experts; ++x)
      if (x != e) {
        to[e * devices + group[x]] += affinity[e * experts + x];
        largest = std::max(largest, std::abs(affinity[e * experts + x]));
      }
  for (bool improved = true; improved;) {
    improved = false;
    for (int64_t a = 0; a < experts; ++a)
      for (int64_t b = a + 1; b < experts; ++b) {
        const int32_t ga = group[a], gb = group[b];
        if (ga == gb) continue;
        const double gain = to[a * devices + gb] - to[a * devices + ga] + to[b * devices + ga] - to[b * devices + gb] - 2 * affinity[a * experts + b];
        if (gain <= 1e-9 * largest) continue;  // what rounding may feign would swap for ever
        for (int64_t x = 0; x < experts; ++x) {
          const double from_a = x == a ? 0.0 : affinity[x * experts + a], from_b = x == b ? 0.0 : affinity[x * experts + b];
          to[x * devices + ga] += from_b - from_a;
          to[x * devices + gb] += from_a - from_b;
        }
        std::swap(group[a], group[b]);
        improved = true;
      }
  }
  double inside = 0.0;
  for (int64_t e = 0; e < experts; ++e) inside += to[e * devices + group[e]];
  return inside;
}

struct Counts {
  const int32_t* at;
  int64_t vocab, experts, devices;
  std::vector<double> load;  // [vocab]
  double cap;
};

// The best device of each token id under the cap; those with most to lose choose first.
std::vector<int32_t> assign_tokens(const Counts& c, const std::vector<int32_t>& expert_device) {
  std::vector<double> local(static_cast<size_t>(c.vocab * c.devices), 0.0), regret(static_cast<size_t>(c.vocab), 0.0);
  for (int64_t t = 0; t < c.vocab; ++t) {
    double* mine = local.data() + t * c.devices;
    for (int64_t e = 0; e < c.experts; ++e) mine[expert_device[e]] += c.at[t * c.experts + e];
    double best = -1, second = -1;
    for (int64_t d = 0; d < c.devices; ++d) {
      second = std::max(second, std::min(best, mine[d]));
      best = std::max(best, mine[d]);
    }
    regret[t] = c.devices > 1 ? best - second : best;
  }
  std::vector<int64_t> order(static_cast<size_t>(c.vocab));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return regret[a] > regret[b]; });
  std::vector<double> filled(static_cast<size_t>(c.devices), 0.0);
  std::vector<int32_t> device(static_cast<size_t>(c.vocab), -1);
  for (int64_t t : order) {
    if (c.load[t] == 0) continue;
    const double* mine = local.data() + t * c.devices;
    int64_t best = -1, emptiest = 0;
    for (int64_t d = 0; d < c.devices; ++d) {
      if (filled[d] < filled[emptiest]) emptiest = d;
      if (filled[d] + c.load[t] <= c.cap && (best < 0 || mine[d] > mine[best])) best = d;
    }
    if (best < 0) best = emptiest;  // one id alone may be more than a device's share
    device[t] = static_cast<int32_t>(best);
    filled[best] += c.load[t];
  }
  return device;
}

double local_counts(const Counts& c, const Placement& p) {
  double sum = 0;
  for (int64_t t = 0; t < c.vocab; ++t)
    for (int64_t e = 0; e < c.experts; ++e)
      if (p.token_device[t] == p.expert_device[e]) sum += c.at[t * c.experts + e];
  return sum;
}

std::vector<int32_t> assign_experts(const Counts& c, const std::vector<int32_t>& token_device) {
  std::vector<double> gain(static_cast<size_t>(c.experts * c.devices), 0.0);
  for (int64_t t = 0; t < c.vocab; ++t)
    if (token_device[t] >= 0)
      for (int64_t e = 0; e < c.experts; ++e) gain[e * c.devices + token_device[t]] += c.at[t * c.experts + e];
  return balanced_assignment(gain, c.experts, c.devices);
}

}  // namespace

// One item after the other finds a cheapest path to a device with room, along which items already placed move on. A device stands for all
// of its places, so a path visits devices only. What is placed is optimal for its numbers at each step, so no cycle of moves gains.
std::vector<int32_t> balanced_assignment(const std::vector<double>& score, int64_t items, int64_t devices) {
  const int64_t room = items / devices;
  std::vector<int32_t> device(static_cast<size_t>(items), -1);
  std::vector<int64_t> filled(static_cast<size_t>(devices), 0);
  for (int64_t item = 0; item < items; ++item) {
    // distance[d]: least loss of score that brings `item` in when d takes one more; by Bellman and Ford over moves d -> d2 of one item of d.
    std::vector<double> distance(static_cast<size_t>(devices)), move(static_cast<size_t>(devices * devices), kInfinity);
    std::vector<int64_t> mover(static_cast<size_t>(devices * devices), -1), before(static_cast<size_t>(devices), -1);
    for (int64_t i = 0; i < item; ++i)
      for (int64_t d = 0, from = device[i]; d < devices; ++d) {
        const double loss = score[i * devices + from] - score[i * devices + d];
        if (d != from && loss < move[from * devices + d]) {
          move[from * devices + d] = loss;
          mover[from * devices + d] = i;
        }
      }
    for (int64_t d = 0; d < devices; ++d) distance[d] = -score[item * devices + d];
    for (int64_t round = 1; round < devices; ++round) {
      bool shorter = false;
      for (int64_t from = 0; from < devices; ++from)
        for (int64_t d = 0; d < devices; ++d)
          if (distance[from] + move[from * devices + d] < distance[d] - 1e-12 * (1 + std::abs(distance[d]))) {
            distance[d] = distance[from] + move[from * devices + d];
            before[d] = from;
            shorter = true;
          }
      if (!shorter) break;
    }
    int64_t end = -1;
    for (int64_t d = 0; d < devices; ++d)
      if (filled[d] < room && (end < 0 || distance[d] < distance[end])) end = d;
    ++filled[end];
    for (int64_t steps = 0; before[end] >= 0 && steps < devices; ++steps) {
      device[mover[before[end] * devices + end]] = static_cast<int32_t>(end);
      end = before[end];
    }
    device[item] = static_cast<int32_t>(end);
  }
  return device;
}

std::vector<int32_t> group_experts(const std::vector<double>& affinity, int64_t experts, int64_t devices, int starts, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> best;
  double most = -kInfinity;
  for (int start = 0; start < starts; ++start) {
    std::vector<int32_t> group = start == 0 ? greedy_groups(affinity, experts, devices) : random_balanced(experts, devices, random);
    const double inside = improve_by_swaps(affinity, experts, devices, group);
    if (best.empty() || inside > most) {
      most = inside;
      best = std::move(group);
    }
  }
  return best;
}

Placement place_experts(const int32_t* counts, int64_t vocab, int64_t experts, int64_t devices, double slack, int starts, uint64_t seed) {
  constexpr int kRounds = 32;  // alternation settles within a few
  Counts c{counts, vocab, experts, devices, std::vector<double>(static_cast<size_t>(vocab), 0.0), 0.0};
  std::vector<double> together(static_cast<size_t>(experts * experts), 0.0);
  std::vector<int64_t> seen;  // experts of one token id
  double total = 0;
  for (int64_t t = 0; t < vocab; ++t) {
    const int32_t* row = counts + t * experts;
    for (int64_t e = 0; e < experts; ++e) c.load[t] += row[e];
    total += c.load[t];
    seen.clear();
    for (int64_t e = 0; e < experts; ++e)
      if (row[e]) seen.push_back(e);
    for (int64_t a : seen)
      for (int64_t b : seen) together[a * experts + b] += row[a] * static_cast<double>(row[b]) / c.load[t];
  }
  c.cap = (1 + slack) * total / static_cast<double>(devices);
  std::mt19937_64 random(seed);
  Placement best;
  best.local = -1;
  for (int start = 0; start < starts; ++start) {
    Placement now;
    now.expert_device = start == 0 ? group_experts(together, experts, devices, 4, seed) : random_balanced(experts, devices, random);
    now.token_device = assign_tokens(c, now.expert_device);
    now.local = local_counts(c, now);
    for (int round = 0; round < kRounds; ++round) {
      Placement next;
      next.expert_device = assign_experts(c, now.token_device);
      next.token_device = assign_tokens(c, next.expert_device);
      next.local = local_counts(c, next);
      if (next.local <= now.local) {
        // The experts alone never lose by their new places; the capped tokens may.
        next.token_device = now.token_device;
        next.local = local_counts(c, next);
        if (next.local <= now.local) break;
      }
      now = std::move(next);
    }
    if (now.local > best.local) best = std::move(now);
  }
  return best;
}

std::vector<int32_t> shuffle_rows(const int32_t* wanted, const float* confidence, int64_t rows, int64_t devices, int64_t* moved) {
  std::vector<std::vector<int32_t>> slice(static_cast<size_t>(devices));
  std::vector<int32_t> homeless;
  auto room = [&](int64_t d) { return static_cast<size_t>(rows / devices + (d < rows % devices)); };
  for (int64_t i = 0; i < rows; ++i) (wanted[i] < 0 ? homeless : slice[wanted[i]]).push_back(static_cast<int32_t>(i));
  const size_t without_wish = homeless.size();
  for (int64_t d = 0; d < devices; ++d) {
    std::vector<int32_t>& s = slice[d];
    if (s.size() <= room(d)) continue;
    std::stable_sort(s.begin(), s.end(), [&](int32_t a, int32_t b) { return confidence && confidence[a] > confidence[b]; });
    homeless.insert(homeless.end(), s.begin() + static_cast<int64_t>(room(d)), s.end());
    s.resize(room(d));
  }
  *moved = static_cast<int64_t>(homeless.size() - without_wish);
  std::sort(homeless.begin(), homeless.end());
  for (int32_t i : homeless) {
    int64_t emptiest = 0;
    for (int64_t d = 1; d < devices; ++d)
      if (room(d) - slice[d].size() > room(emptiest) - slice[emptiest].size()) emptiest = d;
    slice[emptiest].push_back(i);
  }
  std::vector<int32_t> order;
  order.reserve(static_cast<size_t>(rows));
  for (std::vector<int32_t>& s : slice) {
    std::sort(s.begin(), s.end());
    order.insert(order.end(), s.begin(), s.end());
  }
  return order;
}

}  // namespace stretto
