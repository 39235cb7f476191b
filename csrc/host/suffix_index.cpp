#include "host/suffix_index.h"

#include <algorithm>

namespace stretto {

void SuffixIndex::add(const int32_t* tokens, int64_t n) {
  tokens_.reserve(tokens_.size() + static_cast<size_t>(n) + 1);
  order_.reserve(order_.size() + static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order_.push_back(static_cast<uint32_t>(tokens_.size() + static_cast<size_t>(i)));
  tokens_.insert(tokens_.end(), tokens, tokens + n);
  tokens_.push_back(kEnd);
  const int32_t* all = tokens_.data();
  std::sort(order_.begin(), order_.end(), [all, depth = depth_](uint32_t a, uint32_t b) {
    for (int i = 0; i <= depth; ++i) {
      const int32_t x = all[a + static_cast<uint32_t>(i)], y = all[b + static_cast<uint32_t>(i)];
      if (x != y) return x < y;
      if (x == kEnd) break;
    }
    return a < b;
  });
}

// First place in [begin, end) whose next token is larger; begin itself has `token`. Galloping: most ranges are short.
uint32_t SuffixIndex::upper(uint32_t begin, uint32_t end, int offset, int32_t token) const {
  uint32_t step = 1, low = begin;
  while (low + step < end && token_at(low + step, offset) <= token) {
    low += step;
    step *= 2;
  }
  uint32_t high = std::min(low + step, end);
  ++low;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (token_at(middle, offset) <= token) low = middle + 1;
    else high = middle;
  }
  return high;
}

uint32_t SuffixIndex::skip_ended(Range range, int offset) const {
  if (range.begin == range.end || token_at(range.begin, offset) != kEnd) return range.begin;
  return upper(range.begin, range.end, offset, kEnd);
}

SuffixIndex::Range SuffixIndex::narrow(Range range, int offset, int32_t token) const {
  const auto first = order_.begin() + range.begin, last = order_.begin() + range.end;
  const auto found = std::partition_point(first, last, [&](uint32_t p) { return tokens_[p + static_cast<uint32_t>(offset)] < token; });
  const uint32_t begin = static_cast<uint32_t>(found - order_.begin());
  if (found == last || tokens_[*found + static_cast<uint32_t>(offset)] != token) return {begin, begin};
  return {begin, upper(begin, range.end, offset, token)};
}

}  // namespace stretto
