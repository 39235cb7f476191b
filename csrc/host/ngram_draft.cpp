// Which n-grams below a place become the draft: selection and order.
#include <algorithm>
#include <stdexcept>

#include "host/ngram_trie.h"

namespace stretto {
namespace {

struct Candidate {
  int32_t token;
  uint32_t parent;  // candidate; the root is its own
  int depth;
  CountTrie::NodeId output;
  SuffixIndex::Range input;
  uint32_t f_out, f_in;
  uint64_t f;
  uint32_t first_child = 0, num_children = 0;
  bool expanded = false, chosen = false;
};

class Selection {
 public:
  Selection(const NgramPlace& place, int32_t root_token, int budget, int max_depth, NgramMode mode)
      : place_(place), mode_(mode), room_(budget - 1), max_depth_(max_depth) {
    nodes_.reserve(static_cast<size_t>(8 * budget));
    nodes_.push_back({root_token, 0, 0, place.output, place.input, UINT32_MAX, UINT32_MAX, UINT64_MAX});
    nodes_[0].chosen = true;
  }

  // The likelier part of the budget goes by score; in mode mix half of it goes by output count first, so that a prompt that
  // mentions everything cannot push out what answers usually say.
  void choose_tree() {
    if (mode_ == NgramMode::mix) take_best([](const Candidate& c) { return uint64_t{c.f_out}; }, room_ / 2);
    take_best([](const Candidate& c) { return c.f; }, room_ - taken_);
  }

  void choose_chain() {
    for (uint32_t at = 0; taken_ < room_;) {
      expand(at);
      const Candidate& node = nodes_[at];
      if (node.num_children == 0) return;
      uint32_t best = node.first_child;
      for (uint32_t c = best + 1; c < node.first_child + node.num_children; ++c)
        if (nodes_[c].f > nodes_[best].f) best = c;  // children stand in order of tokens: the smallest wins a tie
      nodes_[best].chosen = true;
      ++taken_;
      at = best;
    }
  }

  NgramDraft emit() {
    NgramDraft draft;
    struct Open {
      uint32_t node;
      int32_t parent;
    };
    std::vector<Open> stack{{0, -1}};
    std::vector<uint32_t> kids;
    while (!stack.empty()) {
      const Open open = stack.back();
      stack.pop_back();
      const int32_t place = static_cast<int32_t>(draft.tokens.size());
      draft.tokens.push_back(nodes_[open.node].token);
      draft.parent.push_back(open.parent);
      kids.clear();
      const Candidate& node = nodes_[open.node];
      for (uint32_t c = node.first_child; c < node.first_child + node.num_children; ++c)
        if (nodes_[c].chosen) kids.push_back(c);
      std::sort(kids.begin(), kids.end(), [this](uint32_t a, uint32_t b) {
        return nodes_[a].f != nodes_[b].f ? nodes_[a].f > nodes_[b].f : nodes_[a].token < nodes_[b].token;
      });
      for (size_t i = kids.size(); i-- > 0;) stack.push_back({kids[i], place});
    }
    return draft;
  }

 private:
  // 1e4 * ((1 - w) f_in + w f_out) with w = 1e-4 in mode mix: the prompt wins, history breaks ties.
  uint64_t score(uint32_t f_in, uint32_t f_out) const {
    if (mode_ == NgramMode::input) return f_in;
    if (mode_ == NgramMode::output) return f_out;
    return uint64_t{9999} * f_in + f_out;
  }

  void add_child(uint32_t parent, int32_t token, CountTrie::NodeId output, SuffixIndex::Range input) {
    const uint32_t f_out = output == CountTrie::kNone ? 0 : place_.outputs->count(output), f_in = input.size();
    const uint64_t f = score(f_in, f_out);
    if (f == 0) return;
    if (f_out > nodes_[parent].f_out || f_in > nodes_[parent].f_in) throw std::logic_error("NgramTrie: a count grows downwards");
    nodes_.push_back({token, parent, nodes_[parent].depth + 1, output, input, f_out, f_in, f});
  }

  // Children of both sides, joined by token; of very many only those that can still be chosen.
  void expand(uint32_t at) {
    if (nodes_[at].expanded) return;
    nodes_[at].expanded = true;
    if (nodes_[at].depth >= max_depth_) return;
    const Candidate node = nodes_[at];
    const uint32_t first = static_cast<uint32_t>(nodes_.size());
    uint32_t n = 0, i = 0;
    const CountTrie::Entry* entries = nullptr;
    if (node.output != CountTrie::kNone && mode_ != NgramMode::input) entries = place_.outputs->children(node.output, &n);
    if (place_.prompt && mode_ != NgramMode::output)
      place_.prompt->each_child(node.input, place_.offset + node.depth, [&](int32_t token, SuffixIndex::Range range) {
        for (; i < n && entries[i].token < token; ++i) add_child(at, entries[i].token, entries[i].node, {});
        const bool both = i < n && entries[i].token == token;
        add_child(at, token, both ? entries[i].node : CountTrie::kNone, range);
        i += both;
      });
    for (; i < n; ++i) add_child(at, entries[i].token, entries[i].node, {});
    if (nodes_.size() - first > 2 * static_cast<size_t>(room_)) thin(first);
    nodes_[at].first_child = first;
    nodes_[at].num_children = static_cast<uint32_t>(nodes_.size()) - first;
  }

  // Keeps the siblings that are among the best `room` by either order; no other can be chosen.
  void thin(uint32_t first) {
    const auto begin = nodes_.begin() + first, cut = begin + room_;
    std::nth_element(begin, cut, nodes_.end(), [](const Candidate& a, const Candidate& b) { return a.f != b.f ? a.f > b.f : a.token < b.token; });
    const auto end = cut + std::min<int64_t>(room_, nodes_.end() - cut);
    std::nth_element(cut, end, nodes_.end(),
                     [](const Candidate& a, const Candidate& b) { return a.f_out != b.f_out ? a.f_out > b.f_out : a.token < b.token; });
    nodes_.erase(end, nodes_.end());
    std::sort(begin, nodes_.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  }

  // Path order of two candidates of equal depth: by the first token in which they differ.
  bool before(uint32_t a, uint32_t b) const {
    if (nodes_[a].parent != nodes_[b].parent && before(nodes_[a].parent, nodes_[b].parent)) return true;
    return nodes_[a].parent == nodes_[b].parent && nodes_[a].token < nodes_[b].token;
  }

  // Best first: a child never beats its parent, so this is the order of a full sort, and what is chosen is closed under parents.
  template <class Score> void take_best(Score score_of, int limit) {
    const auto worse = [&](uint32_t a, uint32_t b) {
      const Candidate &x = nodes_[a], &y = nodes_[b];
      const uint64_t sx = score_of(x), sy = score_of(y);
      if (sx != sy) return sx < sy;
      if (x.depth != y.depth) return x.depth > y.depth;
      if (x.token != y.token) return x.token > y.token;
      return a != b && before(b, a);
    };
    heap_.assign(1, 0);
    while (limit > 0 && !heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end(), worse);
      const uint32_t at = heap_.back();
      heap_.pop_back();
      if (!nodes_[at].chosen) {
        if (!nodes_[nodes_[at].parent].chosen) throw std::logic_error("NgramTrie: a draft node without its parent");
        nodes_[at].chosen = true;
        ++taken_;
        --limit;
      }
      expand(at);
      for (uint32_t c = nodes_[at].first_child; c < nodes_[at].first_child + nodes_[at].num_children; ++c) {
        if (score_of(nodes_[c]) == 0) continue;
        heap_.push_back(c);
        std::push_heap(heap_.begin(), heap_.end(), worse);
      }
    }
  }

  const NgramPlace& place_;
  const NgramMode mode_;
  const int room_, max_depth_;
  int taken_ = 0;
  std::vector<Candidate> nodes_;
  std::vector<uint32_t> heap_;
};

}  // namespace

NgramDraft build_draft(const NgramPlace& place, int32_t root_token, int budget, int max_depth, NgramMode mode, NgramShape shape) {
  Selection selection(place, root_token, budget, max_depth, mode);
  if (shape == NgramShape::tree) selection.choose_tree();
  else selection.choose_chain();
  return selection.emit();
}

}  // namespace stretto
