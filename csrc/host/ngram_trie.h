// Drafts from n-grams: those of the running request's prompt (an index of its own, gone with the request) and those of all outputs
// so far (one trie of counts). Every method may be called from any thread; one mutex.
// Source: arXiv 2312.12728, with prompts kept apart from outputs and outputs counted token by token instead of in blocks.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "host/count_trie.h"
#include "host/suffix_index.h"

namespace stretto {

struct NgramConfig {
  int branch_length = 12;         // deepest draft
  int max_query_length = 2;       // tokens matched before it
  int64_t max_bytes = 256 << 20;  // of everything here
  int32_t vocab_size = 0;
  uint32_t max_tree_nodes = 512;     // output nodes below one root that survive the end of a request unsqueezed
  std::vector<int32_t> eos;          // an output ends before the first of these
  std::vector<int32_t> stop_tokens;  // too common to start an output branch or to be looked up alone
};

enum class NgramMode { mix, input, output };
enum class NgramShape { tree, one };

struct NgramDraft {
  std::vector<int32_t> tokens, parent;  // node 0 is the last token of the suffix, parent[0] = -1; depth-first, the likelier child first
};

struct NgramStats { int64_t nodes, trees, bytes, requests, evicted_trees, squeezed_trees, queries, hits, drafted; };

class NgramTrie {
 public:
  explicit NgramTrie(NgramConfig config);
  const NgramConfig& config() const { return config_; }

  void insert_input(int64_t request, const int32_t* tokens, int64_t n);   // a prompt; its first token is left out
  void extend_output(int64_t request, const int32_t* tokens, int64_t n);  // the next tokens of the request's answer
  void insert_output(const int32_t* tokens, int64_t n);                   // a whole text
  void release(int64_t request);                                          // end of a request; unknown ones are ignored
  NgramDraft query(const int32_t* suffix, int64_t n, int budget, int max_depth, NgramMode mode, NgramShape shape, int64_t request);

  // How often the n-gram tokens[0..n) (n >= 2) was counted in the request's prompt, and in outputs.
  std::pair<int64_t, int64_t> count(const int32_t* tokens, int64_t n, int64_t request) const;
  NgramStats stats() const;
  std::vector<int32_t> dump() const;
  std::string restore(const int32_t* words, int64_t size);  // replaces all outputs, or returns what is wrong and changes nothing

 private:
  struct Request {
    std::unique_ptr<SuffixIndex> prompt;
    CountTrie::Text output;
    bool ended = false;  // an EOS was seen
  };

  int span() const { return config_.branch_length + config_.max_query_length - 1; }  // tokens counted below a root
  bool is_stop(int32_t token) const;
  bool is_eos(int32_t token) const;
  void append_output(CountTrie::Text& text, const int32_t* tokens, int64_t n, bool* ended);
  void make_room();

  const NgramConfig config_;
  mutable std::mutex mutex_;
  std::unique_ptr<CountTrie> outputs_;
  std::unordered_map<int64_t, Request> requests_;
  int64_t prompt_bytes_ = 0, queries_ = 0, hits_ = 0, drafted_ = 0;
};

// The draft below one place of the n-grams. Shared with tests through NgramTrie::query only.
struct NgramPlace {
  const CountTrie* outputs;
  CountTrie::NodeId output;   // kNone: not among the outputs
  const SuffixIndex* prompt;  // null: no prompt
  SuffixIndex::Range input;   // positions of the prompt that match
  int offset;                 // tokens matched so far
};
NgramDraft build_draft(const NgramPlace& place, int32_t root_token, int budget, int max_depth, NgramMode mode, NgramShape shape);

}  // namespace stretto
