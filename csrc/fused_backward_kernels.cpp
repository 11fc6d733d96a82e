// Gradients of norm and SwiGLU, for one instruction set (isa.h). Torch's profiler counts 14 operations, each a pass
// over memory, for a norm and its gradients, and 5 for SwiGLU's.
#include "fused_rows.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

// With n = x * factor and g = weight * grad: grad_x = factor * (g - n * mean(g * n)), and grad * n of each row, n as
// the forward pass rounded it, is added to `sums`, for the weight's gradient.
template <class T, class W, class Y>
void norm_row_back(const FusedGradients& a, int64_t index, float* row, float* sums) {
  const T* x = row_of<const T>(a.x, index, a.x_row);
  const Y* grad = row_of<const Y>(a.grad, index, a.grad_row);
  const W* weight = static_cast<const W*>(a.weight);
  T* grad_x = row_of<T>(a.grad_x, index, a.width);
  vec squares[4] = {}, products[4] = {};
  each_vector(a.width, [&](int64_t k, int lanes) {
    const vec value = get(x + k, lanes);
    store(row + k, value);
    squares[k / WIDTH % 4] += value * value;
  });
  const float factor = norm_factor(squares, a.width, a.eps);
  each_vector(a.width, [&](int64_t k, int lanes) {
    const vec normed = load(row + k) * factor, g = get(grad + k, lanes);
    products[k / WIDTH % 4] += g * get(weight + k, lanes) * normed;
    store(sums + k, load(sums + k) + g * rounded<T>(normed));
  });
  const float mean = sum_lanes((products[0] + products[1]) + (products[2] + products[3])) / float(a.width);
  each_vector(a.width, [&](int64_t k, int lanes) {
    const vec normed = load(row + k) * factor, g = get(grad + k, lanes) * get(weight + k, lanes);
    put(grad_x + k, factor * (g - normed * mean), lanes);
  });
}

template <class T>
void swiglu_row_back(const FusedGradients& a, int64_t index) {
  const T *gate = row_of<const T>(a.x, index, a.x_row), *up = row_of<const T>(a.other, index, a.other_row);
  const T* grad = row_of<const T>(a.grad, index, a.grad_row);
  T *grad_gate = row_of<T>(a.grad_x, index, a.width), *grad_up = row_of<T>(a.grad_other, index, a.width);
  each_vector(a.width, [&](int64_t k, int lanes) {
    const vec x = get(gate + k, lanes), g = get(grad + k, lanes);
    put(grad_up + k, g * (x * sigmoid(x)), lanes);
    put(grad_gate + k, g * get(up + k, lanes) * silu_slope(x), lanes);
  });
}

}  // namespace

void fused_norm_back_task(void* context, int64_t slice) {
  const FusedGradientsPlan& plan = *static_cast<const FusedGradientsPlan*>(context);
  const FusedGradients& a = plan.args;
  alignas(64) float row[FUSED_MAX_WIDTH + WIDTH];
  float *run = plan.sums + slice * 2 * plan.pitch, *total = run + plan.pitch;
  int64_t in_run = 0;
  for (int64_t index = slice * a.rows / FUSED_SLICES; index < (slice + 1) * a.rows / FUSED_SLICES; ++index) {
    with_types(a, [&](auto x, auto weight, auto y) {
      norm_row_back<decltype(x), decltype(weight), decltype(y)>(a, index, row, run);
    });
    if (++in_run == SUM_RUN) {
      end_run(run, total, a.width);
      in_run = 0;
    }
  }
  end_run(run, total, a.width);
}

void fused_swiglu_back_task(void* context, int64_t task) {
  each_row(*static_cast<const FusedGradients*>(context), task, [](const FusedGradients& a, int64_t index, float*) {
    with_type(a.dtype, [&](auto x) { swiglu_row_back<decltype(x)>(a, index); });
  });
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
