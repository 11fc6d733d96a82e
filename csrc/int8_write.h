// A tile of int8 products that is finished, on its way to y. Include from *_kernels.cpp only.
#pragma once

#include "int8_pack.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// What a tile needs beside its numbers. `sums` holds what earlier blocks of inputs gave; it is not touched where the
// first block is the last.
struct Tile {
  const float* row_scale;
  const int32_t* row_sum;
  const float *scale, *bias;
  int32_t* sums;
  int64_t sums_row;
  bool first, last;  // block of inputs
  int rows, outputs;
  void* y;
  int64_t y_dtype, y_row;
};

template <class Out>
LONGLLAVA_INLINE void write_some(Out* to, vec y, int lanes) {
  if (lanes >= WIDTH) store(to, y);
  else if (lanes > 0) store_some(to, y, lanes);
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

// A tile whose sums are there, scaled and written some rows at a time.
template <class Dot>
struct Finished {
  ivec sums[ROWS][VECTORS];
  Tile t;
  vec scale[VECTORS], bias[VECTORS];
  int row = 0, rows = 0;  // the next one, their number

  void open(const Tile& tile, int most) {
    t = tile;
    row = 0;
    rows = t.rows < most ? t.rows : most;
    for (int j = 0; j < VECTORS; ++j) {
      const int left = t.outputs - j * WIDTH, lanes = left > 0 ? left : 0;
      scale[j] = lanes >= WIDTH ? load(t.scale + j * WIDTH) : load_some(t.scale + j * WIDTH, lanes);
      bias[j] = vec{};
      if (t.bias != nullptr) bias[j] = lanes >= WIDTH ? load(t.bias + j * WIDTH) : load_some(t.bias + j * WIDTH, lanes);
    }
  }

  void write(int n) {
    const int end = row + n < rows ? row + n : rows;
    if (t.y_dtype == DTYPE_FLOAT32) write_rows(static_cast<float*>(t.y), end);
    else write_rows(static_cast<uint16_t*>(t.y), end);
    row = end;
  }

 private:
  template <class Out>
  void write_rows(Out* y, int end) {
    const bool whole = t.outputs >= TILE_OUTPUTS;
    y += row * t.y_row;
    for (int i = row; i < end; ++i, y += t.y_row) {
      const uint32_t offset = Dot::OFFSET == 0 ? 0u : uint32_t(Dot::OFFSET) * uint32_t(t.row_sum[i]);
      vec out[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) {
        const vec sum = __builtin_convertvector((ivec)((uvec)sums[i][j] - offset), vec);
        out[j] = sum * scale[j] * t.row_scale[i] + bias[j];
      }
      if (whole) write_whole(y, out);
      else
        for (int j = 0; j < VECTORS; ++j) write_some(y + j * WIDTH, out[j], t.outputs - j * WIDTH);
    }
  }
};

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
