// Norm with residual, and SwiGLU, for one instruction set (isa.h): each element is read once and written once.
//
// A row lies in L1 as fp32 between the pass that finds its mean square, or its largest value, and the pass that writes
// it. Torch's own norm makes five passes over memory, and quantisation six more.
#include "fused_rows.h"
#include "int8_rows.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

// Row `index` of the int8 rows, from y's numbers, which are rounded already.
LONGLLAVA_INLINE void quantise(const FusedArguments& a, int64_t index, float* row) {
  if (a.rotated) rotate_row(row, a.width, row);
  const float* absmax = a.absmax == nullptr ? nullptr : a.absmax + index;
  quantise_row<false>(row, a.width, absmax, a.values + index * a.width, a.scale + index);
}

template <class T, class W, class Y>
void norm_row(const FusedArguments& a, int64_t index, float* row) {
  const T *x = row_of<const T>(a.x, index, a.x_row), *residual = row_of<const T>(a.other, index, a.other_row);
  const W* weight = static_cast<const W*>(a.weight);
  T* total = row_of<T>(a.total, index, a.width);
  Y* y = row_of<Y>(a.y, index, a.width);
  vec squares[4] = {};
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
  const float factor = norm_factor(squares, a.width, a.eps);
  each_vector(a.width, [&](int64_t k, int lanes) {
    const vec scaled = rounded<T>(load(row + k) * factor) * get(weight + k, lanes);
    if (a.values == nullptr) put(y + k, scaled, lanes);
    else store(row + k, rounded<Y>(scaled));
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

}  // namespace

void fused_norm_task(void* context, int64_t task) {
  each_row(*static_cast<const FusedArguments*>(context), task, [](const FusedArguments& a, int64_t index, float* row) {
    with_types(a, [&](auto x, auto weight, auto y) {
      norm_row<decltype(x), decltype(weight), decltype(y)>(a, index, row);
    });
  });
}

void fused_swiglu_task(void* context, int64_t task) {
  each_row(*static_cast<const FusedArguments*>(context), task, [](const FusedArguments& a, int64_t index, float* row) {
    with_type(a.dtype, [&](auto x) { swiglu_row<decltype(x)>(a, index, row); });
  });
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
