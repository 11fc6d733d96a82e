// Rows of int8 sums on their way to y. Include from *_kernels.cpp only.
#pragma once

#include "int8_pack.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// Where a tile of sums goes, and what it is multiplied by.
template <class Out>
struct Tile {
  const float* row_scale;
  const int32_t* row_sum;
  const float *scale, *bias;
  int rows, outputs;
  Out* y;
  int64_t y_row;
};

// Numbers of outputs first .. first + WIDTH - 1, 0 from n on.
LONGLLAVA_INLINE vec load_outputs(const float* from, int first, int n) {
  return n - first >= WIDTH ? load(from + first) : n > first ? load_some(from + first, n - first) : vec{};
}

template <class Out>
LONGLLAVA_INLINE void write_whole(Out* to, const vec (&y)[VECTORS]) {
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; ++j) store(to + j * WIDTH, y[j]);
}

#if defined(LONGLLAVA_BF16)
LONGLLAVA_INLINE void write_whole(uint16_t* to, const vec (&y)[VECTORS]) {
  static_assert(VECTORS == 2, "one instruction for both");
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)y[1], (__m512)y[0]));
}
#endif

template <class Out>
LONGLLAVA_INLINE void write_some(Out* to, const vec (&y)[VECTORS], int n) {
  for (int j = 0; j < VECTORS; ++j) {
    const int lanes = n - j * WIDTH;
    if (lanes >= WIDTH) store(to + j * WIDTH, y[j]);
    else if (lanes > 0) store_some(to + j * WIDTH, y[j], lanes);
  }
}

// MOST rows of a tile from `first` on, or what there is of them. Factors are loaded once for all.
template <class Dot, int MOST, class Out>
LONGLLAVA_INLINE void write_rows(const Tile<Out>& t, const ivec (*sums)[VECTORS], int first) {
  vec scale[VECTORS], bias[VECTORS];
#pragma GCC unroll 4
  for (int j = 0; j < VECTORS; ++j) {
    scale[j] = load_outputs(t.scale, j * WIDTH, t.outputs);
    bias[j] = t.bias != nullptr ? load_outputs(t.bias, j * WIDTH, t.outputs) : vec{};
  }
  const int rows = t.rows - first < MOST ? t.rows - first : MOST;
  const float* row_scale = t.row_scale + first;
  const int32_t* row_sum = t.row_sum + first;
  Out* y = t.y + first * t.y_row;
  const int64_t y_row = t.y_row;
  sums += first;
  const auto scaled = [&](int i, vec(&out)[VECTORS]) __attribute__((always_inline)) {
    const uint32_t offset = Dot::OFFSET == 0 ? 0u : uint32_t(Dot::OFFSET) * uint32_t(row_sum[i]);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j)
      out[j] = __builtin_convertvector((ivec)((uvec)sums[i][j] - offset), vec) * scale[j] * row_scale[i] + bias[j];
  };
  vec out[VECTORS];
  if (rows == MOST && t.outputs >= TILE_OUTPUTS) {
#pragma GCC unroll 4
    for (int i = 0; i < MOST; ++i, y += y_row) {
      scaled(i, out);
      write_whole(y, out);
    }
    return;
  }
  for (int i = 0; i < rows; ++i, y += y_row) {
    scaled(i, out);
    write_some(y, out, t.outputs);
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
