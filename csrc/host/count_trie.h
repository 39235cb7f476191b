// How often each n-gram was seen: a trie of counts below root tokens, bounded by pruning and by evicting whole trees.
//
// A count never grows downwards: a node's count is at most its parent's. Every operation keeps that (paths are counted from the
// root on, halving is monotone, subtrees go as a whole), and selection rests on it.
#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace stretto {

class CountTrie {
 public:
  using NodeId = uint32_t;
  static constexpr NodeId kNone = UINT32_MAX;
  struct Entry {
    int32_t token;
    NodeId node;
  };
  struct Tree {
    NodeId root;
    uint32_t nodes = 0;  // below the root
    bool oversize = false;
    std::list<int32_t>::iterator recent;
  };
  // A text being counted token by token: the branches that are still growing, one for each recent root.
  struct Text {
    struct Branch {
      Tree* tree;
      NodeId node;
      int depth;
    };
    std::vector<Branch> branches;
    int32_t last = -1;   // the next root, once it has a child
    uint64_t epoch = 0;  // branches of an older epoch may point to nodes that are gone, and are dropped
  };

  // depth: tokens counted below a root. A tree with more than max_tree_nodes nodes is squeezed by `squeeze`.
  CountTrie(int depth, uint32_t max_tree_nodes) : depth_(depth), max_tree_nodes_(max_tree_nodes) {}
  CountTrie(const CountTrie&) = delete;
  CountTrie& operator=(const CountTrie&) = delete;
  ~CountTrie() { clear(); }

  // Counts every n-gram that ends with `token`. When `is_root`, later tokens are counted below it too.
  void append(Text& text, int32_t token, bool is_root);
  void squeeze();                 // halves and thins every tree that has outgrown max_tree_nodes
  void evict(int64_t max_bytes);  // drops least recently used trees until bytes() is at most max_bytes
  void clear();

  NodeId find_root(int32_t token) const;  // kNone where there is no such tree
  void touch(int32_t token);              // makes an existing tree the most recently used
  NodeId find_child(NodeId node, int32_t token) const;
  uint32_t count(NodeId node) const { return at(node).count; }
  const Entry* children(NodeId node, uint32_t* n) const;  // sorted by token

  int64_t bytes() const { return bytes_; }
  int64_t nodes() const { return nodes_; }  // roots not counted
  int64_t trees() const { return static_cast<int64_t>(trees_.size()); }
  int64_t evicted_trees() const { return evicted_; }
  int64_t squeezed_trees() const { return squeezed_; }

  // Trees from least to most recently used, each in preorder, int32 triples: token, count, number of children (a root's count is 0).
  std::vector<int32_t> dump() const;
  // Reads what dump wrote into an empty trie. Returns what is wrong with it, or "" ; checks before it follows anything.
  std::string restore(const int32_t* words, int64_t size, int32_t vocab_size);

 private:
  struct Node {
    uint32_t count;
    uint32_t num_children;
    union {
      Entry one;    // num_children 1
      Entry* many;  // num_children >= 2: capacity bit_ceil(num_children)
      NodeId next;  // on the free list
    };
  };
  static constexpr int kChunkBits = 14;  // 16,384 nodes, 256 KB

  Node& at(NodeId id) { return chunks_[id >> kChunkBits][id & ((1u << kChunkBits) - 1)]; }
  const Node& at(NodeId id) const { return chunks_[id >> kChunkBits][id & ((1u << kChunkBits) - 1)]; }
  NodeId make_node(uint32_t count);
  void free_node(NodeId id);
  int64_t free_subtree(NodeId id);  // returns the nodes freed
  NodeId add_child(NodeId parent, int32_t token, uint32_t count);
  void set_children(NodeId id, const Entry* entries, uint32_t n);  // replaces the array, not the nodes
  int64_t squeeze_node(NodeId id);
  Tree& tree_of(int32_t token);
  void drop_tree(std::unordered_map<int32_t, Tree>::iterator it);
  void note_size(int32_t token, Tree& tree);

  const int depth_;
  const uint32_t max_tree_nodes_;
  std::vector<std::unique_ptr<Node[]>> chunks_;
  NodeId fresh_ = 0, free_ = kNone;
  std::unordered_map<int32_t, Tree> trees_;
  std::list<int32_t> recency_;  // least recently used first
  std::vector<int32_t> oversize_;
  uint64_t epoch_ = 1;
  int64_t bytes_ = 0, nodes_ = 0, evicted_ = 0, squeezed_ = 0;
};

}  // namespace stretto
