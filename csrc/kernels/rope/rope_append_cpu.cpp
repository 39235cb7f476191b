#include "kernels/rope/rope_append.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace stretto::STRETTO_ISA {

static void norm_head(const float* weight, float eps, int64_t head_dim, const float* x, float* out) {
  f32x16 squares = zero();
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    const f32x16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  const f32x16 scale = broadcast(1.f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(head_dim) + eps));
  for (int64_t i = 0; i < head_dim; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

// x and out may be the same.
static void rotate_head(const RopeAppendParams& p, const float* cos_sin, const float* x, float* out) {
  const int64_t half = p.rotary_dim / 2;
  const float *cosine = cos_sin, *sine = cos_sin + half;
  if (p.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cosine[i] - b * sine[i];
      out[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      out[i] = a * cosine[i] - b * sine[i];
      out[i + half] = b * cosine[i] + a * sine[i];
    }
  }
  if (x != out)
    for (int64_t i = p.rotary_dim; i < p.head_dim; ++i) out[i] = x[i];
}

template <class T> STRETTO_INLINE void write_head(const float* x, int64_t head_dim, T* to, int64_t stride, float*) {
  if (stride == 1) {
    for (int64_t i = 0; i < head_dim; i += kLanes) store(to + i, load(x + i));
    return;
  }
  T row[kLanes];
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    store(row, load(x + i));
    for (int l = 0; l < kLanes; ++l) to[(i + l) * stride] = row[l];
  }
}

template <> inline __attribute__((always_inline)) void write_head<int8_t>(const float* x, int64_t head_dim, int8_t* to, int64_t stride,
                                                                          float* scale) {
  float largest = 0.f;
  bool finite = true;
  for (int64_t i = 0; i < head_dim; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    finite &= magnitude <= 3.402823466e38f;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = finite ? largest / 127.f : __builtin_nanf("");
  // Not 127 / largest: below 1e-36 that would be infinite.
  const float divisor = finite && *scale > 0.f ? *scale : __builtin_inff();
  for (int64_t i = 0; i < head_dim; ++i) to[i * stride] = static_cast<int8_t>(finite ? __builtin_rintf(x[i] / divisor) : 0.f);
}

template <class T> static void append_row(const RopeAppendParams& p, int64_t row) {
  float head[kMaxHeadDim];
  int64_t position = p.positions[row];
  position = position < 0 ? 0 : position >= p.max_positions ? p.max_positions - 1 : position;
  const float* cos_sin = p.cos_sin + position * p.rotary_dim;
  float* x = p.qkv + row * p.row_stride;
  for (int64_t h = 0; h < p.heads; ++h, x += p.head_dim) {
    if (p.q_norm) norm_head(p.q_norm, p.norm_eps, p.head_dim, x, x);
    rotate_head(p, cos_sin, x, x);
  }
  const int64_t slot = p.slots[row];
  if (slot < 0 || slot >= p.pages * p.page_size) return;
  const int64_t page = slot / p.page_size, offset = slot % p.page_size;
  for (int64_t h = 0; h < p.kv_heads; ++h, x += p.head_dim) {
    const int64_t at = h * p.page_size + offset;
    const float* key = x;
    if (p.k_norm) norm_head(p.k_norm, p.norm_eps, p.head_dim, x, head), key = head;
    rotate_head(p, cos_sin, key, head);
    T* key_column = static_cast<T*>(p.k_pages) + page * p.k_page + h * p.page_size * p.head_dim + offset;
    write_head(head, p.head_dim, key_column, p.page_size, p.k_scales + page * p.k_scale_page + at);
    T* value_row = static_cast<T*>(p.v_pages) + page * p.v_page + at * p.head_dim;
    write_head(x + p.kv_heads * p.head_dim, p.head_dim, value_row, 1, p.v_scales + page * p.v_scale_page + at);
  }
}

void rope_append(const RopeAppendParams& p) {
  const int64_t rows = p.num_rows && *p.num_rows < p.rows ? *p.num_rows : p.rows;
  if (p.max_positions == 0) return;
  const int64_t grain = 8192 / ((p.heads + 2 * p.kv_heads) * p.head_dim + 1) + 1;  // about 5 us a task
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, rows, grain, [&](int64_t row) { append_row<T>(p, row); });
  };
  if (p.dtype == DType::i8) run(TypeTag<int8_t>{});
  else dispatch_float(p.dtype, run);
}

}  // namespace stretto::STRETTO_ISA
