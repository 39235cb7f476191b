// The common part of stable counting sorts over chunks of items: each chunk counts its keys, an exclusive sum over chunks gives each
// (chunk, key) the place of its first item within the key, and chunks place their items independently.
// For *_cpu.cpp only, as common/simd.h.
#pragma once
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

struct ChunkCounts {
  int32_t* table;  // [chunks, keys] in the caller's scratch: counts, then places
  int64_t chunks, keys, chunk_items;
};

// count(first, last, int32_t counts[keys]) adds up the items [first, last).
template <class Count> static ChunkCounts count_chunks(int64_t items, int64_t keys, int64_t chunk_items, const Count& count) {
  ChunkCounts c{nullptr, (items + chunk_items - 1) / chunk_items, keys, chunk_items};
  c.table = static_cast<int32_t*>(thread_scratch(0, (c.chunks * keys + 1) * static_cast<int64_t>(sizeof(int32_t))));
  parallel_for(0, c.chunks, 1, [&](int64_t i) {
    int32_t* counts = c.table + i * keys;
    std::memset(counts, 0, static_cast<size_t>(keys) * sizeof(int32_t));
    count(i * chunk_items, (i + 1) * chunk_items < items ? (i + 1) * chunk_items : items, counts);
  });
  return c;
}

// Turns counts into places within the key; totals[keys] receives the number of items of each key.
static inline void sum_over_chunks(const ChunkCounts& c, int32_t* totals) {
  std::memset(totals, 0, static_cast<size_t>(c.keys) * sizeof(int32_t));
  for (int64_t i = 0; i < c.chunks; ++i)
    for (int64_t key = 0; key < c.keys; ++key) {
      const int32_t n = c.table[i * c.keys + key];
      c.table[i * c.keys + key] = totals[key];
      totals[key] += n;
    }
}

}  // namespace stretto::STRETTO_ISA
