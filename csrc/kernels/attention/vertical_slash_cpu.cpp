#include "kernels/attention/vertical_slash.h"

#include "common/parallel.h"

namespace stretto::STRETTO_ISA {

struct ListCounts { int32_t intervals, columns; };

// The lists of one block; written where there is a place for them.
static ListCounts block_lists(const VerticalSlashParams& p, int64_t list, int64_t block, int32_t* intervals, int32_t* columns) {
  const int32_t* verticals = p.verticals + list * p.num_verticals;
  const int32_t* slashes = p.slashes + list * p.num_slashes;
  const int64_t shift = p.k_len - p.q_len, a = block * p.block + shift;
  const int64_t b = (block + 1) * p.block < p.q_len ? a + p.block : p.k_len;
  ListCounts n{0, 0};
  int64_t vertical = 0, begin = 0, end = 0;  // [begin, end): the interval under way
  const auto verticals_below = [&](int64_t limit) {
    for (; vertical < p.num_verticals && verticals[vertical] < limit; ++vertical) {
      if (columns) columns[n.columns] = verticals[vertical];
      ++n.columns;
    }
  };
  const auto close = [&] {
    if (begin == end) return;
    verticals_below(begin);
    while (vertical < p.num_verticals && verticals[vertical] < end) ++vertical;
    if (intervals) intervals[2 * n.intervals] = static_cast<int32_t>(begin), intervals[2 * n.intervals + 1] = static_cast<int32_t>(end);
    ++n.intervals;
  };
  for (int64_t i = p.num_slashes - 1; i >= 0; --i) {  // farthest first: keys grow
    const int64_t low = a - slashes[i] > 0 ? a - slashes[i] : 0, high = b - slashes[i];
    if (high <= low) continue;
    if (low > end || begin == end) {
      close();
      begin = low;
    }
    end = high;
  }
  close();
  verticals_below(b);
  return n;
}

void vertical_slash(const VerticalSlashParams& p) {
  parallel_for(0, p.lists, 1, [&](int64_t list) {
    int32_t *interval_ptr = p.interval_ptr + list * (p.blocks + 1), *column_ptr = p.column_ptr + list * (p.blocks + 1);
    for (int64_t block = 0; block < p.blocks; ++block) {
      if (!p.count) {
        block_lists(p, list, block, p.intervals + 2 * int64_t(interval_ptr[block]), p.columns + column_ptr[block]);
        continue;
      }
      const ListCounts n = block_lists(p, list, block, nullptr, nullptr);
      interval_ptr[block + 1] = n.intervals, column_ptr[block + 1] = n.columns;
    }
  });
}

}  // namespace stretto::STRETTO_ISA
