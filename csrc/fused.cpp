// Entry points of the elementwise work between linear layers: hands blocks of rows to threads.
#define LONGLLAVA_FORM entry
#include "fused.h"
#include "entry.h"

using namespace longllava;

namespace {

void by_rows(const FusedArguments& a, double nanoseconds, void (*task)(void*, int64_t)) {
  const int threads = useful_threads(a.threads, nanoseconds * double(a.rows) * double(a.width));
  parallel_for(ceil_div(a.rows, FUSED_ROWS), threads, task, const_cast<FusedArguments*>(&a));
}

}  // namespace

// Both return 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_rms_norm(const FusedArguments* args) {
  return guarded(args, [](const FusedArguments& a) { by_rows(a, 0.5, LONGLLAVA_PICK(fused_norm_task)); });
}

LONGLLAVA_EXPORT int longllava_swiglu(const FusedArguments* args) {
  return guarded(args, [](const FusedArguments& a) { by_rows(a, 1.0, LONGLLAVA_PICK(fused_swiglu_task)); });
}
