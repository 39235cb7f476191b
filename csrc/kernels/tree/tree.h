// Draft trees as kernels see them: node 0 is the last committed token, parent[0] = -1, 0 <= parent[i] < i for 0 < i < n; slots from n
// on are unused and not read. n = 0 is an idle slot. A row that breaks this is malformed: no kernel follows its parents.
#pragma once
#include <cstdint>

namespace stretto {

static inline bool valid_tree(const int32_t* parent, int64_t n, int64_t slots) {
  if (n < 0 || n > slots) return false;
  if (n > 0 && parent[0] != -1) return false;
  for (int64_t i = 1; i < n; ++i)
    if (parent[i] < 0 || parent[i] >= i) return false;
  return true;
}

}  // namespace stretto
