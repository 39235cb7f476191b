#include "kernels/sampling/noise.h"

#include "common/parallel.h"

namespace stretto::STRETTO_ISA {

void noise(const NoiseParams& p) {
  parallel_for(0, p.rows, 1024 / (p.width + 1) + 1, [&](int64_t row) {
    if (p.width == 0) p.out[row] = uniform53(noise_block(p.seed[row], p.lineage[row], p.pos[row], p.purpose, p.index));
    for (int64_t i = 0; i < p.width; ++i)
      p.out[row * p.width + i] = -__builtin_log(-__builtin_log(uniform_open(token_word(p.seed[row], p.lineage[row], p.pos[row], p.purpose, i))));
  });
}

}  // namespace stretto::STRETTO_ISA
