// Counter-based noise: Philox4x32-10. A number is a pure function of (seed, lineage; position, purpose, index); there is no state,
// so what a request draws does not depend on its neighbours, on the width of a draft tree, or on who proposed it.
//   key = seed (64 bits); counter = [index + 2^28 purpose, position, lineage low, lineage high]. The map is injective.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; known answers are in the tests.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace stretto {

enum class Purpose : uint32_t { token = 0, accept = 1, draft = 2 };  // DESIGN 3.6; the same numbers in ops/sampling.py
inline constexpr uint32_t kMaxNoiseIndex = (1u << 28) - 1;

// Everything here is static: these functions are compiled into every instruction set's objects and must not be shared by the linker.
struct PhiloxBlock { uint32_t word[4]; };

STRETTO_HD static inline PhiloxBlock philox4x32(PhiloxBlock c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.word[0], b = uint64_t(0xCD9E8D57u) * c.word[2];
    c = {{uint32_t(b >> 32) ^ c.word[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c.word[3] ^ key1, uint32_t(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

STRETTO_HD static inline PhiloxBlock noise_block(int64_t seed, int64_t lineage, int32_t position, Purpose purpose, uint32_t index) {
  const uint64_t s = static_cast<uint64_t>(seed), l = static_cast<uint64_t>(lineage);
  const uint32_t first = (static_cast<uint32_t>(purpose) << 28) | (index & kMaxNoiseIndex);
  return philox4x32({{first, static_cast<uint32_t>(position), uint32_t(l), uint32_t(l >> 32)}}, uint32_t(s), uint32_t(s >> 32));
}

// A multiple of 2^-53 in [0, 1).
STRETTO_HD static inline double uniform53(const PhiloxBlock& b) {
  return static_cast<double>(((uint64_t(b.word[1]) << 32) | b.word[0]) >> 11) * 0x1p-53;
}

// In (0, 1), never an end: its logarithm is finite and negative.
STRETTO_HD static inline double uniform_open(uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

// Noise of one vocabulary entry: four entries share a block.
STRETTO_HD static inline uint32_t token_word(int64_t seed, int64_t lineage, int32_t position, Purpose purpose, int64_t token) {
  return noise_block(seed, lineage, position, purpose, static_cast<uint32_t>(token / 4)).word[token % 4];
}

}  // namespace stretto
