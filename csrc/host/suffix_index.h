// Where each n-gram of a fixed text occurs: its positions, sorted by the tokens that follow. A trie over the same n-grams would
// hold up to depth nodes a token; here the trie is implicit. A node is a range of the sorted positions, its count the size.
#pragma once
#include <cstdint>
#include <vector>

namespace stretto {

class SuffixIndex {
 public:
  struct Range {
    uint32_t begin = 0, end = 0;
    uint32_t size() const { return end - begin; }
  };

  // depth: tokens that are told apart behind each position's own.
  explicit SuffixIndex(int depth) : depth_(depth) {}
  void add(const int32_t* tokens, int64_t n);  // another text; n-grams do not run from one into the next. O(all * log(all))
  Range all() const { return {0, static_cast<uint32_t>(order_.size())}; }

  // Positions in `range` (which agree in `offset` tokens) whose next token is `token`.
  Range narrow(Range range, int offset, int32_t token) const;
  // f(token, range) for each next token, in rising order.
  template <class F> void each_child(Range range, int offset, const F& f) const {
    for (uint32_t i = skip_ended(range, offset); i < range.end;) {
      const int32_t token = tokens_[order_[i] + static_cast<uint32_t>(offset)];
      const uint32_t next = upper(i, range.end, offset, token);
      f(token, Range{i, next});
      i = next;
    }
  }

  int64_t size() const { return static_cast<int64_t>(order_.size()); }
  int64_t bytes() const { return static_cast<int64_t>(4 * (tokens_.size() + order_.size())); }

 private:
  static constexpr int32_t kEnd = -1;  // behind each text; sorts before every token
  int32_t token_at(uint32_t i, int offset) const { return tokens_[order_[i] + static_cast<uint32_t>(offset)]; }
  uint32_t upper(uint32_t begin, uint32_t end, int offset, int32_t token) const;
  uint32_t skip_ended(Range range, int offset) const;

  const int depth_;
  std::vector<int32_t> tokens_;
  std::vector<uint32_t> order_;
};

}  // namespace stretto
