#include "host/pack_weights.h"

#include <cstring>

#include "common/parallel.h"

namespace stretto {
namespace {

// Nibbles in GGUF's order for a block of 32: byte j holds k = j low and k = j + 16 high; that is quad j / 4 and quad j / 4 + 4 already.
void put_nibbles(const uint8_t* bytes, uint8_t* block, int lane) {
  for (int g = 0; g < 4; ++g) std::memcpy(block + 64 * g + 4 * lane, bytes + 4 * g, 4);
}
// From 32 values below 16.
void put_nibbles_of(const uint8_t* values, uint8_t* block, int lane) {
  uint8_t bytes[16];
  for (int j = 0; j < 16; ++j) bytes[j] = static_cast<uint8_t>((values[j] & 15) | values[j + 16] << 4);
  put_nibbles(bytes, block, lane);
}
// Bit i of `bits` is the fifth bit of k = i.
void put_fifth_bits(uint32_t bits, uint8_t* plane, int lane) {
  for (int j = 0; j < 4; ++j) {
    uint8_t byte = 0;
    for (int g = 0; g < 8; ++g) byte |= static_cast<uint8_t>((bits >> (4 * g + j) & 1u) << g);
    plane[4 * lane + j] = byte;
  }
}
void put_half(const uint8_t* half, uint8_t* halves, int lane) { std::memcpy(halves + 2 * lane, half, 2); }

// Q4_K, Q5_K: the 12 bytes hold eight 6-bit scales and eight 6-bit minimums; the last four of each keep their top bits in the first bytes.
void six_bit_scales(const uint8_t* s, uint8_t* sc, uint8_t* mn) {
  for (int i = 0; i < 4; ++i) {
    sc[i] = s[i] & 63;
    mn[i] = s[i + 4] & 63;
    sc[i + 4] = static_cast<uint8_t>((s[i + 8] & 15) | (s[i] >> 6) << 4);
    mn[i + 4] = static_cast<uint8_t>(s[i + 8] >> 4 | (s[i + 4] >> 6) << 4);
  }
}

void pack_k45(const uint8_t* raw, uint8_t* unit, int lane, bool five) {
  uint8_t sc[8], mn[8], values[32];
  six_bit_scales(raw + 4, sc, mn);
  put_half(raw, unit, lane);
  put_half(raw + 2, unit + 32, lane);
  const uint8_t *high = raw + 16, *quants = raw + (five ? 48 : 16);  // Q5_K: bit b of high[j] is the fifth bit of value j of block b
  for (int b = 0; b < 8; ++b) {
    unit[64 + 32 * b + lane] = sc[b];
    unit[80 + 32 * b + lane] = mn[b];
    uint8_t* block = unit + 320 + (five ? 320 : 256) * b;
    for (int j = 0; j < 32; ++j) values[j] = static_cast<uint8_t>(quants[32 * (b / 2) + j] >> (b % 2 ? 4 : 0) & 15);
    put_nibbles_of(values, block, lane);
    if (!five) continue;
    uint32_t bits = 0;
    for (int j = 0; j < 32; ++j) bits |= uint32_t(high[j] >> b & 1) << j;
    put_fifth_bits(bits, block + 256, lane);
  }
}

// Q6_K: 128 bytes of low nibbles, 64 of high pairs, 16 scales, d. Each half of 128 values: four runs of 32, the first two runs in low
// nibbles, the next two in high nibbles of 64 bytes; the pairs of run r are bits 2r, 2r + 1 of 32 bytes.
void pack_q6_k(const uint8_t* raw, uint8_t* unit, int lane) {
  const uint8_t *low = raw, *high = raw + 128, *scales = raw + 192;
  put_half(raw + 208, unit, lane);
  for (int i = 0; i < 16; ++i) unit[32 + 16 * i + lane] = scales[i];
  for (int b = 0; b < 8; ++b) {
    const int half = b / 4, run = b % 4;
    uint8_t values[32], pairs[32];
    for (int j = 0; j < 32; ++j) {
      values[j] = static_cast<uint8_t>(low[64 * half + 32 * (run % 2) + j] >> (run < 2 ? 0 : 4) & 15);
      pairs[j] = static_cast<uint8_t>(high[32 * half + j] >> 2 * run & 3);
    }
    uint8_t* block = unit + 288 + 384 * b;
    put_nibbles_of(values, block, lane);
    for (int h = 0; h < 2; ++h)
      for (int j = 0; j < 4; ++j) {
        uint8_t byte = 0;
        for (int i = 0; i < 4; ++i) byte |= static_cast<uint8_t>(pairs[16 * h + 4 * i + j] << 2 * i);
        block[256 + 64 * h + 4 * lane + j] = byte;
      }
  }
}

void pack_unit(WeightFormat format, const uint8_t* raw, uint8_t* unit, int lane) {
  switch (format) {
    case WeightFormat::f32: std::memcpy(unit + 4 * lane, raw, 4); return;
    case WeightFormat::f16:
    case WeightFormat::bf16: put_half(raw, unit, lane); return;
    case WeightFormat::q8_0:
      for (int g = 0; g < 8; ++g)
        for (int j = 0; j < 4; ++j) unit[64 * g + 4 * lane + j] = raw[2 + 4 * g + j] ^ 0x80;
      return put_half(raw, unit + 512, lane);
    case WeightFormat::q4_0: put_nibbles(raw + 2, unit, lane); return put_half(raw, unit + 256, lane);
    case WeightFormat::q4_1:
      put_nibbles(raw + 4, unit, lane);
      put_half(raw, unit + 256, lane);
      return put_half(raw + 2, unit + 288, lane);
    case WeightFormat::q5_0:
    case WeightFormat::q5_1: {
      const int skip = format == WeightFormat::q5_0 ? 2 : 4;
      uint32_t bits;
      std::memcpy(&bits, raw + skip, 4);
      put_nibbles(raw + skip + 4, unit, lane);
      put_fifth_bits(bits, unit + 256, lane);
      put_half(raw, unit + 320, lane);
      if (skip == 4) put_half(raw + 2, unit + 352, lane);
      return;
    }
    case WeightFormat::q4_k: return pack_k45(raw, unit, lane, false);
    case WeightFormat::q5_k: return pack_k45(raw, unit, lane, true);
    case WeightFormat::q6_k: return pack_q6_k(raw, unit, lane);
  }
}

}  // namespace

void pack_rows(const PackParams& p) {
  const FormatInfo& info = format_info(p.format);
  const int64_t units = p.k / info.unit, row_bytes = units * info.raw_bytes, bytes = group_bytes(p.format, p.k);
  // A task is the rows that land in one group: threads then write to lines of their own.
  const int64_t first_group = p.first / 16, groups = p.rows ? (p.first + p.rows - 1) / 16 - first_group + 1 : 0;
  parallel_for(0, groups, 16, [&](int64_t i) {
    const int64_t begin = (first_group + i) * 16 < p.first ? p.first : (first_group + i) * 16;
    const int64_t end = (first_group + i + 1) * 16 < p.first + p.rows ? (first_group + i + 1) * 16 : p.first + p.rows;
    uint8_t* group = p.packed + (p.part < 0 ? first_group + i : 2 * (first_group + i) + p.part) * bytes;
    for (int64_t u = 0; u < units; ++u)  // unit by unit: the destination is written once, in order
      for (int64_t row = begin; row < end; ++row)
        pack_unit(p.format, p.raw + (row - p.first) * row_bytes + u * info.raw_bytes, group + u * info.packed_bytes, static_cast<int>(row % 16));
  });
}

void pack_padding(uint8_t* packed, int64_t n, int64_t k, WeightFormat format) {
  static constexpr uint8_t kZeros[256] = {};  // a block of any format: d = 0, or 0.0
  const FormatInfo& info = format_info(format);
  for (int64_t row = n; row % 16 != 0; ++row)
    for (int64_t u = 0; u < k / info.unit; ++u)
      pack_unit(format, kZeros, packed + n / 16 * group_bytes(format, k) + u * info.packed_bytes, static_cast<int>(row % 16));
}

}  // namespace stretto
