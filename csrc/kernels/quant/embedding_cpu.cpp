#include "kernels/quant/embedding.h"

#include "common/parallel.h"
#include "kernels/quant/unpack.h"

namespace stretto::STRETTO_ISA {

STRETTO_INLINE float half_at(const uint8_t* p, int lane) {
  half_t h;
  std::memcpy(&h, p + 2 * lane, 2);
  return to_float(h);
}
STRETTO_INLINE int nibble(const uint8_t* block, int byte, int quad) { return (block[64 * (quad & 3) + byte] >> (quad < 4 ? 0 : 4)) & 15; }

// One row (lane) of one unit, in the operations of the file format's own definition: the same bits as any other dequantiser.
static void unpack_unit(WeightFormat format, const uint8_t* unit, int lane, float* out) {
  const int values = format_info(format).unit;
  if (format == WeightFormat::f32) std::memcpy(out, unit + 4 * lane, 4);
  else if (format == WeightFormat::f16) *out = half_at(unit, lane);
  else if (format == WeightFormat::bf16) *out = to_float(reinterpret_cast<const bfloat16_t*>(unit)[lane]);
  else
    for (int i = 0; i < values; ++i) {
      const int b = i / 32, quad = i % 32 / 4, byte = 4 * lane + i % 4;
      switch (format) {
        case WeightFormat::q8_0: out[i] = half_at(unit + 512, lane) * static_cast<float>(unit[64 * quad + byte] - 128); break;
        case WeightFormat::q4_0: out[i] = half_at(unit + 256, lane) * static_cast<float>(nibble(unit, byte, quad) - 8); break;
        case WeightFormat::q4_1: out[i] = half_at(unit + 256, lane) * static_cast<float>(nibble(unit, byte, quad)) + half_at(unit + 288, lane); break;
        case WeightFormat::q5_0:
        case WeightFormat::q5_1: {
          const int q = nibble(unit, byte, quad) | (unit[256 + byte] >> quad & 1) << 4;
          const float d = half_at(unit + 320, lane);
          out[i] = format == WeightFormat::q5_0 ? d * static_cast<float>(q - 16) : d * static_cast<float>(q) + half_at(unit + 352, lane);
          break;
        }
        case WeightFormat::q4_k:
        case WeightFormat::q5_k: {
          const bool five = format == WeightFormat::q5_k;
          const uint8_t *block = unit + 320 + (five ? 320 : 256) * b, *scales = unit + 64 + 32 * b + lane;
          const int q = nibble(block, byte, quad) | (five ? (block[256 + byte] >> quad & 1) << 4 : 0);
          out[i] =
              half_at(unit, lane) * static_cast<float>(scales[0]) * static_cast<float>(q) - half_at(unit + 32, lane) * static_cast<float>(scales[16]);
          break;
        }
        default: {  // q6_k
          const uint8_t* block = unit + 288 + 384 * b;
          const int q = nibble(block, byte, quad) | (block[256 + 64 * (quad / 4) + byte] >> 2 * (quad & 3) & 3) << 4;
          const int8_t sc = static_cast<int8_t>(unit[32 + 16 * (i / 16) + lane]);
          out[i] = half_at(unit, lane) * static_cast<float>(sc) * static_cast<float>(q - 32);
        }
      }
    }
}

void embedding(const EmbeddingParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  const FormatInfo& info = format_info(p.format);
  parallel_for(0, rows, 8192 / (p.k + 1) + 1, [&](int64_t r) {  // about 20 us a task
    const int64_t id = p.ids[r];
    float* out = p.out + r * p.out_stride;
    if (id < 0 || id >= p.n) {
      for (int64_t i = 0; i < p.k; ++i) out[i] = 0.f;
      return;
    }
    const uint8_t* unit = p.packed + id / 16 * group_bytes(p.format, p.k);
    for (int64_t i = 0; i < p.k; i += info.unit, unit += info.packed_bytes) unpack_unit(p.format, unit, static_cast<int>(id % 16), out + i);
    if (p.scale != 1.f)
      for (int64_t i = 0; i < p.k; ++i) out[i] *= p.scale;
  });
}

}  // namespace stretto::STRETTO_ISA
