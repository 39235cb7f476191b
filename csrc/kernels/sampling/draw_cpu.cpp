#include "kernels/sampling/draw.h"

#include "common/parallel.h"
#include "kernels/sampling/inverse_cdf.h"

namespace stretto::STRETTO_ISA {
namespace {

constexpr int kBlocks = 32;  // Philox blocks computed side by side, so that the compiler puts them into lanes

// Noise words of 4 * kBlocks tokens from token 4 * first on.
void noise_words(int64_t seed, int64_t lineage, int32_t pos, Purpose purpose, int64_t first, uint32_t* words) {
  uint32_t c[4][kBlocks], key[2] = {uint32_t(seed), uint32_t(static_cast<uint64_t>(seed) >> 32)};
  for (int i = 0; i < kBlocks; ++i) {
    c[0][i] = (static_cast<uint32_t>(purpose) << 28) | (static_cast<uint32_t>(first + i) & kMaxNoiseIndex);
    c[1][i] = static_cast<uint32_t>(pos);
    c[2][i] = static_cast<uint32_t>(lineage);
    c[3][i] = static_cast<uint32_t>(static_cast<uint64_t>(lineage) >> 32);
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t a = uint64_t(0xD2511F53u) * c[0][i], b = uint64_t(0xCD9E8D57u) * c[2][i];
      const uint32_t c0 = uint32_t(b >> 32) ^ c[1][i] ^ key[0], c2 = uint32_t(a >> 32) ^ c[3][i] ^ key[1];
      c[0][i] = c0, c[1][i] = uint32_t(b), c[2][i] = c2, c[3][i] = uint32_t(a);
    }
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  for (int i = 0; i < kBlocks; ++i)
    for (int k = 0; k < 4; ++k) words[4 * i + k] = c[k][i];
}

int32_t draw_gumbel(const DrawParams& p, int64_t row) {
  const float* w = p.p + row * p.stride;
  constexpr int64_t kTokens = 4 * kBlocks;
  uint32_t words[kTokens];
  double best = __builtin_inf();
  int64_t best_at = -1;
  for (int64_t i = 0; i < p.width; i += kTokens) {
    const int64_t n = p.width - i < kTokens ? p.width - i : kTokens;
    float most = 0;
    for (int64_t k = 0; k < n; ++k) most = w[i + k] > most ? w[i + k] : most;
    if (most == 0) continue;
    noise_words(p.seed[row], p.lineage[row], p.pos[row], p.purpose, i / 4, words);
    for (int64_t k = 0; k < n; ++k) {
      const double weight = w[i + k], u = uniform_open(words[k]);
      if (weight > 0 && 1 - u < best * weight) {
        const double time = -__builtin_log(u) / weight;
        if (time < best) best = time, best_at = i + k;
      }
    }
  }
  return static_cast<int32_t>(best_at);
}

}  // namespace

void draw(const DrawParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const int64_t grain = 16384 / (p.width + 1) + 1;
  parallel_for(0, rows, grain, [&](int64_t row) {
    const float* w = p.p + row * p.stride;
    const double total = row_sum(w, p.width);
    if (!(total > 0)) p.out[row] = -1;
    else if (p.gumbel) p.out[row] = draw_gumbel(p, row);
    else p.out[row] = inverse_cdf(w, p.width, total, uniform53(noise_block(p.seed[row], p.lineage[row], p.pos[row], p.purpose, 0)));
  });
}

}  // namespace stretto::STRETTO_ISA
