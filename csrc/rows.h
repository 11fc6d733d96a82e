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

// A piece of a tensor: `n_tokens` tokens from `token` on, `columns` columns from `column` on. As vectors it is laid
// out [block][token], with `pitch` vectors from one block to the next; a block is WIDTH columns.
struct Piece {
  int64_t batch, token, column;
  int columns, n_tokens, pitch;
  const uint8_t* flags;  // TokenFlag of each token
  int64_t next;          // tokens from here to the piece that is wanted next (may be negative), 0 if none
};

// Lines of memory that the next piece reads and writes, fetched a token at a time while this one is worked on. Rows lie
// pages apart, where the processor does not fetch ahead by itself (a factor of 1.6). Fetched all at once, they would take
// the few places for lines on their way from the loads that follow (the scan, E = 1024, fp32, two Zen 3 cores: 1.13 to
// 1.23 times as long).
class Ahead {
 public:
  // The rows of one block of the piece; those without data are left out.
  template <class... R>
  Ahead(const Piece& piece, int block, const R&... rows) {
    if (piece.next != 0) (add(piece, block, rows), ...);
  }
  void fetch() {
    for (int i = 0; i < n_; ++i) {
      __builtin_prefetch(line_[i], 0, 2);
      line_[i] += step_[i];
    }
  }
  void stop() { n_ = 0; }

 private:
  void add(const Piece& piece, int block, const Rows& rows) {
    const int64_t size = rows.dtype == DTYPE_FLOAT32 ? 4 : 2, token = piece.token + piece.next;
    const int64_t column = piece.column + block * WIDTH;
    const char* line = static_cast<const char*>(rows.data) +
                       size * (piece.batch * rows.batch_stride + token * rows.row_stride + column);
    // of the blocks that share a line of 64 bytes, the one that holds its beginning, or would if it began one
    if (rows.data == nullptr || reinterpret_cast<uintptr_t>(line) % 64 >= uintptr_t(size) * WIDTH) return;
    line_[n_] = line;
    step_[n_++] = size * rows.row_stride;
  }

  static constexpr int MOST = 8;
  int n_ = 0;
  const char* line_[MOST];
  int64_t step_[MOST];
};

// The first `lanes` elements from `offset` on, as fp32; what follows them is neither read nor written.
LONGLLAVA_INLINE vec read_lanes(const Rows& rows, int64_t offset, int lanes) {
  if (rows.dtype == DTYPE_FLOAT32) {
    const float* p = static_cast<const float*>(rows.data) + offset;
    return lanes == WIDTH ? load(p) : load_some(p, lanes);
  }
  const uint16_t* p = static_cast<const uint16_t*>(rows.data) + offset;
  return lanes == WIDTH ? load(p) : load_some(p, lanes);
}

LONGLLAVA_INLINE void write_lanes(const Rows& rows, int64_t offset, vec x, int lanes) {
  if (rows.dtype == DTYPE_FLOAT32) {
    float* p = static_cast<float*>(rows.data) + offset;
    lanes == WIDTH ? store(p, x) : store_some(p, x, lanes);
  } else {
    uint16_t* p = static_cast<uint16_t*>(rows.data) + offset;
    lanes == WIDTH ? store(p, x) : store_some(p, x, lanes);
  }
}

template <class T>
LONGLLAVA_INLINE void read_as(const T* p, const Rows& rows, const Piece& piece, vec* out) {
  const int whole = piece.columns / WIDTH, rest = piece.columns % WIDTH;
  for (int t = 0; t < piece.n_tokens; ++t, p += rows.row_stride) {
    vec* to = out + t;
    if (piece.flags[t] == TOKEN_PADDING) {
      for (int block = 0; block < whole + (rest != 0); ++block) to[block * piece.pitch] = vec{};
      continue;
    }
    for (int block = 0; block < whole; ++block) to[block * piece.pitch] = load(p + block * WIDTH);
    if (rest != 0) to[whole * piece.pitch] = load_some(p + whole * WIDTH, rest);
  }
}

// Padding is not read: 0 stands there, as in missing lanes.
static inline void read_piece(const Rows& rows, const Piece& piece, vec* out) {
  const int64_t offset = piece.batch * rows.batch_stride + piece.token * rows.row_stride + piece.column;
  if (rows.dtype == DTYPE_FLOAT32) read_as(static_cast<const float*>(rows.data) + offset, rows, piece, out);
  else read_as(static_cast<const uint16_t*>(rows.data) + offset, rows, piece, out);
}

template <class T>
LONGLLAVA_INLINE void write_as(T* p, const Rows& rows, const Piece& piece, const vec* in) {
  const int whole = piece.columns / WIDTH, rest = piece.columns % WIDTH;
  for (int t = 0; t < piece.n_tokens; ++t, p += rows.row_stride) {
    if (piece.flags[t] == TOKEN_PADDING) {
      __builtin_memset(p, 0, piece.columns * sizeof(T));
      continue;
    }
    for (int block = 0; block < whole; ++block) store(p + block * WIDTH, in[block * piece.pitch + t]);
    if (rest != 0) store_some(p + whole * WIDTH, in[whole * piece.pitch + t], rest);
  }
}

// The reverse of read_piece; writes 0 at padding.
static inline void write_piece(const Rows& rows, const Piece& piece, const vec* in) {
  const int64_t offset = piece.batch * rows.batch_stride + piece.token * rows.row_stride + piece.column;
  if (rows.dtype == DTYPE_FLOAT32) write_as(static_cast<float*>(rows.data) + offset, rows, piece, in);
  else write_as(static_cast<uint16_t*>(rows.data) + offset, rows, piece, in);
}

// All `columns` of the piece's tokens as fp32, row after row; padding is not read and its place not written.
static inline void read_rows(const Rows& rows, const Piece& piece, int columns, float* out) {
  const int64_t offset = piece.batch * rows.batch_stride + piece.token * rows.row_stride;
  for (int t = 0; t < piece.n_tokens; ++t, out += columns) {
    if (piece.flags[t] == TOKEN_PADDING) continue;
    if (rows.dtype == DTYPE_FLOAT32) {
      const float* p = static_cast<const float*>(rows.data) + offset + t * rows.row_stride;
      int i = 0;  // a call of memcpy takes as long as the few vectors it copies
      for (; i + WIDTH <= columns; i += WIDTH) store(out + i, load(p + i));
      for (; i < columns; ++i) out[i] = p[i];
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(rows.data) + offset + t * rows.row_stride;
      for (int i = 0; i < columns; ++i) out[i] = bf16_to_float(p[i]);
    }
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
