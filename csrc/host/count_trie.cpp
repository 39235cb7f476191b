#include "host/count_trie.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace stretto {
namespace {

// What one node, child array and tree cost, with what malloc and the hash table add.
constexpr int64_t kNodeBytes = 16;
constexpr int64_t kTreeBytes = 112;
int64_t array_bytes(uint32_t n) { return n < 2 ? 0 : 16 + 8 * static_cast<int64_t>(std::bit_ceil(n)); }

const CountTrie::Entry* lower(const CountTrie::Entry* first, uint32_t n, int32_t token) {
  return std::lower_bound(first, first + n, token, [](const CountTrie::Entry& e, int32_t t) { return e.token < t; });
}

}  // namespace

CountTrie::NodeId CountTrie::make_node(uint32_t count) {
  NodeId id = free_;
  if (id != kNone) {
    free_ = at(id).next;
  } else {
    id = fresh_;
    if ((id >> kChunkBits) == chunks_.size()) chunks_.push_back(std::make_unique<Node[]>(size_t{1} << kChunkBits));
    ++fresh_;
  }
  at(id).count = count;
  at(id).num_children = 0;
  bytes_ += kNodeBytes;
  return id;
}

void CountTrie::free_node(NodeId id) {
  Node& node = at(id);
  if (node.num_children >= 2) {
    bytes_ -= array_bytes(node.num_children);
    delete[] node.many;
  }
  node.num_children = 0;
  node.next = free_;
  free_ = id;
  bytes_ -= kNodeBytes;
}

int64_t CountTrie::free_subtree(NodeId id) {
  uint32_t n;
  const Entry* entries = children(id, &n);
  int64_t freed = 1;
  for (uint32_t i = 0; i < n; ++i) freed += free_subtree(entries[i].node);
  free_node(id);
  return freed;
}

const CountTrie::Entry* CountTrie::children(NodeId id, uint32_t* n) const {
  const Node& node = at(id);
  *n = node.num_children;
  return node.num_children < 2 ? &node.one : node.many;
}

CountTrie::NodeId CountTrie::find_child(NodeId id, int32_t token) const {
  uint32_t n;
  const Entry* entries = children(id, &n);
  const Entry* found = lower(entries, n, token);
  return found != entries + n && found->token == token ? found->node : kNone;
}

CountTrie::NodeId CountTrie::find_root(int32_t token) const {
  const auto it = trees_.find(token);
  return it == trees_.end() ? kNone : it->second.root;
}

void CountTrie::touch(int32_t token) {
  const auto it = trees_.find(token);
  if (it != trees_.end()) recency_.splice(recency_.end(), recency_, it->second.recent);
}

CountTrie::NodeId CountTrie::add_child(NodeId parent, int32_t token, uint32_t count) {
  const NodeId child = make_node(count);  // may move nothing: chunks stay where they are
  Node& node = at(parent);
  const uint32_t n = node.num_children;
  if (n == 0) {
    node.one = {token, child};
  } else {
    uint32_t size;
    const Entry* old = children(parent, &size);
    const size_t before = static_cast<size_t>(lower(old, n, token) - old);
    Entry* grown = node.many;
    if (std::has_single_bit(n)) {  // full, or the inline place
      grown = new Entry[std::bit_ceil(n + 1)];
      std::memcpy(grown, old, before * sizeof(Entry));
      std::memcpy(grown + before + 1, old + before, (n - before) * sizeof(Entry));
      if (n >= 2) delete[] node.many;
      bytes_ += array_bytes(n + 1) - array_bytes(n);
    } else {
      std::memmove(grown + before + 1, grown + before, (n - before) * sizeof(Entry));
    }
    grown[before] = {token, child};
    node.many = grown;
  }
  node.num_children = n + 1;
  ++nodes_;
  return child;
}

void CountTrie::set_children(NodeId id, const Entry* entries, uint32_t n) {
  Node& node = at(id);
  if (node.num_children >= 2) {
    bytes_ -= array_bytes(node.num_children);
    delete[] node.many;
  }
  node.num_children = n;
  if (n == 1) node.one = entries[0];
  if (n >= 2) {
    node.many = new Entry[std::bit_ceil(n)];
    std::memcpy(node.many, entries, n * sizeof(Entry));
    bytes_ += array_bytes(n);
  }
}

CountTrie::Tree& CountTrie::tree_of(int32_t token) {
  const auto [it, added] = trees_.try_emplace(token);
  if (added) {
    it->second.root = make_node(0);
    it->second.recent = recency_.insert(recency_.end(), token);
    bytes_ += kTreeBytes;
  } else {
    recency_.splice(recency_.end(), recency_, it->second.recent);
  }
  return it->second;
}

void CountTrie::note_size(int32_t token, Tree& tree) {
  if (tree.nodes > max_tree_nodes_ && !tree.oversize) {
    tree.oversize = true;
    oversize_.push_back(token);
  }
}

void CountTrie::append(Text& text, int32_t token, bool is_root) {
  if (text.epoch != epoch_) {
    text.branches.clear();
    text.last = -1;
    text.epoch = epoch_;
  }
  if (text.last >= 0) {
    Tree& tree = tree_of(text.last);
    text.branches.push_back({&tree, tree.root, 0});
  }
  size_t kept = 0;
  for (Text::Branch branch : text.branches) {
    NodeId child = find_child(branch.node, token);
    if (child == kNone) {
      child = add_child(branch.node, token, 1);
      ++branch.tree->nodes;
      note_size(*branch.tree->recent, *branch.tree);
    } else if (at(child).count < INT32_MAX) {
      ++at(child).count;
    }
    branch.node = child;
    if (++branch.depth < depth_) text.branches[kept++] = branch;
  }
  text.branches.resize(kept);
  text.last = is_root ? token : -1;
}

int64_t CountTrie::squeeze_node(NodeId id) {
  uint32_t n;
  const Entry* entries = children(id, &n);
  std::vector<Entry> kept;
  int64_t freed = 0;
  for (uint32_t i = 0; i < n; ++i) {
    const Entry entry = entries[i];
    if (at(entry.node).count > 1) {
      at(entry.node).count /= 2;
      freed += squeeze_node(entry.node);
      kept.push_back(entry);
    } else {
      freed += free_subtree(entry.node);
    }
  }
  if (kept.size() != n) set_children(id, kept.data(), static_cast<uint32_t>(kept.size()));
  return freed;
}

void CountTrie::squeeze() {
  if (oversize_.empty()) return;
  ++epoch_;
  for (int32_t token : std::exchange(oversize_, {})) {
    const auto it = trees_.find(token);
    if (it == trees_.end()) continue;  // evicted since
    Tree& tree = it->second;
    const int64_t freed = squeeze_node(tree.root);
    nodes_ -= freed;
    tree.nodes -= static_cast<uint32_t>(freed);
    tree.oversize = false;
    ++squeezed_;
    if (tree.nodes == 0) drop_tree(it);
    else note_size(token, tree);
  }
}

void CountTrie::drop_tree(std::unordered_map<int32_t, Tree>::iterator it) {
  nodes_ -= free_subtree(it->second.root) - 1;
  bytes_ -= kTreeBytes;
  recency_.erase(it->second.recent);
  trees_.erase(it);
}

void CountTrie::evict(int64_t max_bytes) {
  if (bytes_ <= max_bytes) return;
  ++epoch_;
  while (bytes_ > max_bytes && !recency_.empty()) {
    drop_tree(trees_.find(recency_.front()));
    ++evicted_;
  }
}

void CountTrie::clear() {
  ++epoch_;
  while (!trees_.empty()) drop_tree(trees_.begin());
  oversize_.clear();
}

std::vector<int32_t> CountTrie::dump() const {
  std::vector<int32_t> words;
  words.reserve(static_cast<size_t>(3 * (nodes_ + trees())));
  std::vector<Entry> stack;
  for (int32_t token : recency_) {
    stack.push_back({token, trees_.at(token).root});
    while (!stack.empty()) {
      const Entry entry = stack.back();
      stack.pop_back();
      uint32_t n;
      const Entry* entries = children(entry.node, &n);
      words.insert(words.end(), {entry.token, static_cast<int32_t>(at(entry.node).count), static_cast<int32_t>(n)});
      for (uint32_t i = n; i-- > 0;) stack.push_back(entries[i]);
    }
  }
  return words;
}

std::string CountTrie::restore(const int32_t* words, int64_t size, int32_t vocab_size) {
  struct Open {
    NodeId node;
    int64_t children_left;
    int32_t last_token, count;
  };
  std::vector<Open> path;  // from the root to the node whose children come next
  Tree* tree = nullptr;
  for (int64_t i = 0; i < size; i += 3) {
    const int32_t token = words[i], count = words[i + 1], num_children = words[i + 2];
    const std::string where = "node " + std::to_string(i / 3) + ": ";
    if (token < 0 || token >= vocab_size) return where + "token " + std::to_string(token) + ", expected 0 to " + std::to_string(vocab_size - 1);
    if (num_children < 0 || num_children > (size - i) / 3 - 1)
      return where + "children " + std::to_string(num_children) + ", expected at most the nodes that follow";
    if (path.empty()) {
      if (count != 0 || num_children == 0)
        return where + "a root with count " + std::to_string(count) + " and " + std::to_string(num_children) + " children, expected 0 and some";
      if (trees_.count(token)) return where + "token " + std::to_string(token) + " is a root for the second time";
      tree = &tree_of(token);
      path.push_back({tree->root, num_children, -1, INT32_MAX});
      continue;
    }
    Open& parent = path.back();
    if (token <= parent.last_token)
      return where + "token " + std::to_string(token) + ", expected more than its sibling's " + std::to_string(parent.last_token);
    if (count < 1 || count > parent.count)
      return where + "count " + std::to_string(count) + ", expected 1 to its parent's " + std::to_string(parent.count);
    if (num_children && static_cast<int>(path.size()) >= depth_) return where + "deeper than " + std::to_string(depth_);
    const NodeId node = add_child(parent.node, token, static_cast<uint32_t>(count));
    ++tree->nodes;
    note_size(*tree->recent, *tree);
    parent.last_token = token;
    --parent.children_left;
    if (num_children) path.push_back({node, num_children, -1, count});
    while (!path.empty() && path.back().children_left == 0) path.pop_back();
  }
  return path.empty() ? "" : "the last tree ends early";
}

}  // namespace stretto
