// Rows of fused.h's tensors, a vector at a time. Include from fused*_kernels.cpp only.
#pragma once

#include "fused.h"
#include "vector_math.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

// As stored in T and read again.
template <class T>
LONGLLAVA_INLINE vec rounded(vec x) {
  if constexpr (sizeof(T) == 2) return x == x ? bits<vec>(nearest_halves(x) & 0xffff0000u) : x;
  return x;
}

// Null where there is no tensor.
template <class T, class Data>
LONGLLAVA_INLINE T* row_of(Data* data, int64_t index, int64_t pitch) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + index * pitch;
}

// f(k, lanes) for each vector of a row: WIDTH lanes, the last perhaps fewer.
template <class F>
LONGLLAVA_INLINE void each_vector(int64_t width, F f) {
  int64_t k = 0;
  for (; k + WIDTH <= width; k += WIDTH) f(k, WIDTH);
  if (k < width) f(k, int(width - k));
}

// Missing lanes are 0.
template <class T>
LONGLLAVA_INLINE vec get(const T* p, int lanes) {
  return lanes == WIDTH ? load(p) : load_some(p, lanes);
}

template <class T>
LONGLLAVA_INLINE void put(T* p, vec x, int lanes) {
  if (lanes == WIDTH) store(p, x);
  else store_some(p, x, lanes);
}

// f(an element of that type)
template <class F>
LONGLLAVA_INLINE void with_type(int64_t dtype, F f) {
  if (dtype == DTYPE_FLOAT32) f(float{});
  else f(uint16_t{});
}

// f(an element of x, of the weight, of y)
template <class Arguments, class F>
LONGLLAVA_INLINE void with_types(const Arguments& a, F f) {
  with_type(a.dtype, [&](auto x) {
    with_type(a.weight_dtype, [&](auto weight) { with_type(a.y_dtype, [&](auto y) { f(x, weight, y); }); });
  });
}

// f(a, index, row) for the rows of a task; row: room for one as fp32.
template <class Arguments, class F>
LONGLLAVA_INLINE void each_row(const Arguments& a, int64_t task, F f) {
  const int64_t first = task * FUSED_ROWS, end = first + FUSED_ROWS < a.rows ? first + FUSED_ROWS : a.rows;
  alignas(64) float row[FUSED_MAX_WIDTH + WIDTH];
  for (int64_t index = first; index < end; ++index) f(a, index, row);
}

// 1 / sqrt(mean(x^2) + eps) of a row, given its sums of squares in four chains that do not wait for one another.
LONGLLAVA_INLINE float norm_factor(const vec (&squares)[4], int64_t width, double eps) {
  const float mean = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(width);
  return 1.0f / __builtin_sqrtf(mean + float(eps));
}

}  // namespace
}  // namespace LONGLLAVA_FORM
}  // namespace longllava
