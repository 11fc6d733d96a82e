// Entry points of the elementwise work between linear layers: hands blocks of rows to threads.
#define LONGLLAVA_FORM entry
#include "fused.h"
#include "entry.h"

using namespace longllava;

namespace {

template <class Arguments>
int threads_for(const Arguments& a, double nanoseconds) {
  return useful_threads(a.threads, nanoseconds * double(a.rows) * double(a.width));
}

template <class Arguments>
void by_rows(const Arguments& a, double nanoseconds, void (*task)(void*, int64_t)) {
  parallel_for(ceil_div(a.rows, FUSED_ROWS), threads_for(a, nanoseconds), task, const_cast<Arguments*>(&a));
}

}  // namespace

// Each returns 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_rms_norm(const FusedArguments* args) {
  return guarded(args, [](const FusedArguments& a) { by_rows(a, 0.5, LONGLLAVA_PICK(fused_norm_task)); });
}

LONGLLAVA_EXPORT int longllava_swiglu(const FusedArguments* args) {
  return guarded(args, [](const FusedArguments& a) { by_rows(a, 1.0, LONGLLAVA_PICK(fused_swiglu_task)); });
}

LONGLLAVA_EXPORT int longllava_rms_norm_backward(const FusedGradients* args) {
  return guarded(args, [](const FusedGradients& a) {
    const int64_t pitch = ceil_div(a.width, 16) * 16;
    std::vector<float> sums(FUSED_SLICES * 2 * pitch);
    FusedGradientsPlan plan{a, pitch, sums.data()};
    parallel_for(FUSED_SLICES, threads_for(a, 1.0), LONGLLAVA_PICK(fused_norm_back_task), &plan);
    for (int64_t k = 0; k < a.width; ++k) {
      float sum = 0;
      for (int64_t slice = 0; slice < FUSED_SLICES; ++slice) sum += sums[(slice * 2 + 1) * pitch + k];
      a.grad_weight[k] = sum;
    }
  });
}

LONGLLAVA_EXPORT int longllava_swiglu_backward(const FusedGradients* args) {
  return guarded(args, [](const FusedGradients& a) { by_rows(a, 2.0, LONGLLAVA_PICK(fused_swiglu_back_task)); });
}
