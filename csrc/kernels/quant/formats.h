// Weight formats and how they are packed. The layout is the same for every instruction set.
//
// Output rows go in groups of 16 (n is padded up with rows of zeros); a group holds its rows' blocks in order of k, each block with
// the 16 rows side by side, so that a lane of a register is an output and no sum crosses lanes. "Quad" g of a block of 32 is
// k = 4g .. 4g+3, the four bytes that one 32-bit lane of an integer dot product takes; a vector is 64 bytes, row r's quad at byte 4r.
//
// format      unit of k  bytes of a unit (16 rows)
// f32/f16/bf16        1  16 values
// q8_0               32  8 vectors: quads 0..7, each byte q + 128;  16 d
// q4_0, q4_1         32  4 vectors: vector g has quad g in the low nibbles and quad g + 4 in the high ones;  16 d;  [16 m]
// q5_0, q5_1         32  as above, then one vector: bit g of byte 4r + j is bit 4 of the value at k = 4g + j, before d [and m]
// q4_k, q5_k        256  16 d;  16 dmin;  8 blocks x (16 sc, 16 mn: uint8);  8 blocks x (as q4 / q5, without d)
// q6_k              256  16 d;  16 half blocks x 16 sc (int8);  8 blocks x (4 vectors of nibbles, then 2 vectors: bits 2i, 2i+1 of
//                        vector h are bits 4 and 5 of quad 4h + i)
// d, m, dmin are fp16 as in the file. Bytes are those of GGUF, except the K formats' 6-bit sc and mn, which take 8 (148 bytes for 144).
// Source: ggml-common.h of ggml-org/ggml for the meaning of the blocks.
#pragma once
#include <cstdint>

namespace stretto {

enum class WeightFormat : int32_t { f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k };

struct FormatInfo {
  const char* name;
  int unit;          // values along k in a block of the file, and in a unit of the packed form
  int raw_bytes;     // of one row's block in the file
  int packed_bytes;  // of one unit: 16 rows
};
inline constexpr int kNumFormats = 11;
static constexpr FormatInfo kFormatInfo[kNumFormats] = {
    {"F32", 1, 4, 64},     {"F16", 1, 2, 32},     {"BF16", 1, 2, 32},       {"Q8_0", 32, 34, 544},    {"Q4_0", 32, 18, 288},   {"Q4_1", 32, 20, 320},
    {"Q5_0", 32, 22, 352}, {"Q5_1", 32, 24, 384}, {"Q4_K", 256, 144, 2368}, {"Q5_K", 256, 176, 2880}, {"Q6_K", 256, 210, 3360}};

static constexpr const FormatInfo& format_info(WeightFormat f) { return kFormatInfo[static_cast<int>(f)]; }
static constexpr int64_t group_bytes(WeightFormat f, int64_t k) { return k / format_info(f).unit * format_info(f).packed_bytes; }

}  // namespace stretto
