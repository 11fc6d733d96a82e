// A (batch, tokens, columns) tensor of fp32 or bf16 whose last axis has stride 1, read and written as fp32 vectors.
#pragma once

#include "vector.h"

namespace longllava {

// Strides in elements. data may be null where an argument is optional.
struct Rows {
  void* data;
  int64_t dtype, batch_stride, row_stride;
};

enum TokenFlag : uint8_t { TOKEN_PLAIN = 0, TOKEN_RESET = 1, TOKEN_PADDING = 2 };

namespace LONGLLAVA_FORM {

template <class T>
LONGLLAVA_INLINE void read_lanes_as(const T* p, int64_t row_stride, int lanes, const uint8_t* flags, int n_tokens,
                                    vec* out) {
  for (int t = 0; t < n_tokens; ++t, p += row_stride) {
    if (flags[t] == TOKEN_PADDING) out[t] = vec{};
    else out[t] = lanes == WIDTH ? load(p) : load_some(p, lanes);
  }
}

// out[t] = `lanes` columns from `column` on of token `first + t`; 0 at padding, which is not read.
static inline void read_lanes(const Rows& rows, int64_t batch, int64_t first, int64_t column, int lanes,
                              const uint8_t* flags, int n_tokens, vec* out) {
  const int64_t offset = batch * rows.batch_stride + first * rows.row_stride + column;
  if (rows.dtype == DTYPE_FLOAT32)
    read_lanes_as(static_cast<const float*>(rows.data) + offset, rows.row_stride, lanes, flags, n_tokens, out);
  else
    read_lanes_as(static_cast<const uint16_t*>(rows.data) + offset, rows.row_stride, lanes, flags, n_tokens, out);
}

template <class T>
LONGLLAVA_INLINE void write_lanes_as(T* p, int64_t row_stride, int lanes, const uint8_t* flags, int n_tokens,
                                     const vec* in) {
  for (int t = 0; t < n_tokens; ++t, p += row_stride) {
    const vec x = flags[t] == TOKEN_PADDING ? vec{} : in[t];
    if (lanes == WIDTH) store(p, x);
    else store_some(p, x, lanes);
  }
}

// The reverse of read_lanes; writes 0 at padding.
static inline void write_lanes(const Rows& rows, int64_t batch, int64_t first, int64_t column, int lanes,
                               const uint8_t* flags, int n_tokens, const vec* in) {
  const int64_t offset = batch * rows.batch_stride + first * rows.row_stride + column;
  if (rows.dtype == DTYPE_FLOAT32)
    write_lanes_as(static_cast<float*>(rows.data) + offset, rows.row_stride, lanes, flags, n_tokens, in);
  else
    write_lanes_as(static_cast<uint16_t*>(rows.data) + offset, rows.row_stride, lanes, flags, n_tokens, in);
}

// out[t * columns + i] = column i of token `first + t`, as fp32; padding is not read and its place not written.
static inline void read_rows(const Rows& rows, int64_t batch, int64_t first, int columns, const uint8_t* flags,
                             int n_tokens, float* out) {
  const int64_t offset = batch * rows.batch_stride + first * rows.row_stride;
  for (int t = 0; t < n_tokens; ++t, out += columns) {
    if (flags[t] == TOKEN_PADDING) continue;
    if (rows.dtype == DTYPE_FLOAT32) {
      __builtin_memcpy(out, static_cast<const float*>(rows.data) + offset + t * rows.row_stride, columns * 4);
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(rows.data) + offset + t * rows.row_stride;
      for (int i = 0; i < columns; ++i) out[i] = bf16_to_float(p[i]);
    }
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
