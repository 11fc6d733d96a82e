// Norm with residual, and SwiGLU, for one instruction set (isa.h): each element is read once and written once.
//
// A row lies in L1 as fp32 between the pass that finds its mean square, or its largest value, and the pass that writes
// it. Torch's own norm makes five passes over memory, and quantisation six more.
#include "fused.h"
#include "int8_rows.h"
#include "vector_math.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

// As stored in T and read again.
template <class T>
LONGLLAVA_INLINE vec rounded(vec x) {
  if constexpr (sizeof(T) == 2) {
    T stored[WIDTH];
    store(stored, x);
    return load(stored);
  }
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

// Row `index` of the int8 rows, from y's numbers, which are rounded already.
LONGLLAVA_INLINE void quantise(const FusedArguments& a, int64_t index, float* row) {
  if (a.rotated) rotate_row(row, a.width, row);
  const float* absmax = a.absmax == nullptr ? nullptr : a.absmax + index;
  quantise_row<false>(row, a.width, absmax, a.values + index * a.width, a.scale + index);
}

template <class T>
void norm_row(const FusedArguments& a, int64_t index, float* row) {
  const T *x = row_of<const T>(a.x, index, a.x_row), *residual = row_of<const T>(a.other, index, a.other_row);
  const T* weight = static_cast<const T*>(a.weight);
  T *total = row_of<T>(a.total, index, a.width), *y = row_of<T>(a.y, index, a.width);
  vec squares[4] = {};  // chains of sums that do not wait for one another
  each_vector(a.width, [&](int64_t k, int lanes) {
    vec sum = get(x + k, lanes);
    if (residual != nullptr) {
      sum = rounded<T>(get(residual + k, lanes) + sum);
      put(total + k, sum, lanes);
    }
    store(row + k, sum);
    vec& square = squares[k / WIDTH % 4];
    square += sum * sum;
  });
  const float mean = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(a.width);
  const float factor = 1.0f / __builtin_sqrtf(mean + float(a.eps));
  each_vector(a.width, [&](int64_t k, int lanes) {
    const vec scaled = rounded<T>(load(row + k) * factor) * get(weight + k, lanes);
    if (a.values == nullptr) put(y + k, scaled, lanes);
    else store(row + k, rounded<T>(scaled));
  });
  if (a.values != nullptr) quantise(a, index, row);
}

template <class T>
void swiglu_row(const FusedArguments& a, int64_t index, float* row) {
  const T *gate = row_of<const T>(a.x, index, a.x_row), *up = row_of<const T>(a.other, index, a.other_row);
  T* y = row_of<T>(a.y, index, a.width);
  each_vector(a.width, [&](int64_t k, int lanes) {
    const vec x = get(gate + k, lanes), product = x * sigmoid(x) * get(up + k, lanes);
    if (a.values == nullptr) put(y + k, product, lanes);
    else store(row + k, rounded<T>(product));
  });
  if (a.values != nullptr) quantise(a, index, row);
}

template <class F>
LONGLLAVA_INLINE void each_row(void* context, int64_t task, F f) {
  const FusedArguments& a = *static_cast<const FusedArguments*>(context);
  const int64_t first = task * FUSED_ROWS, end = first + FUSED_ROWS < a.rows ? first + FUSED_ROWS : a.rows;
  alignas(64) float row[FUSED_MAX_WIDTH + WIDTH];
  for (int64_t index = first; index < end; ++index) f(a, index, row);
}

}  // namespace

void fused_norm_task(void* context, int64_t task) {
  each_row(context, task, [](const FusedArguments& a, int64_t index, float* row) {
    a.dtype == DTYPE_FLOAT32 ? norm_row<float>(a, index, row) : norm_row<uint16_t>(a, index, row);
  });
}

void fused_swiglu_task(void* context, int64_t task) {
  each_row(context, task, [](const FusedArguments& a, int64_t index, float* row) {
    a.dtype == DTYPE_FLOAT32 ? swiglu_row<float>(a, index, row) : swiglu_row<uint16_t>(a, index, row);
  });
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
