// Entry point of the convolution of pixels: makes the plan and hands its tasks to threads.
#define LONGLLAVA_FORM entry
#include "pixel_conv.h"
#include "entry.h"
#include "memory.h"

using namespace longllava;

namespace {

void convolve(const PixelConvArguments& a) {
  PixelConvPlan plan{};
  plan.args = a;
  plan.rows = (a.height + 2 * a.padding - a.kernel) / a.stride + 1;
  plan.columns = (a.width + 2 * a.padding - a.kernel) / a.stride + 1;
  if (a.batch == 0) return;
  const double products = double(a.batch) * plan.rows * plan.columns * plan.depth() * a.outputs;
  const int threads = useful_threads(a.threads, products / 40);
  const Memory weight = memory(4 * plan.depth() * a.outputs);
  plan.weight = reinterpret_cast<float*>(weight.get());
  plan.slot_bytes = ceil_div(4 * a.channels * a.kernel * plan.pitch(), 64) * 64;
  const Memory slots = memory(threads * plan.slot_bytes);
  plan.slots = slots.get();
  parallel_for(a.outputs / PANEL, threads, LONGLLAVA_PICK(pixel_conv_weight_task), &plan);
  parallel_for(threads, threads, LONGLLAVA_PICK(pixel_conv_worker), &plan);
}

}  // namespace

// Returns 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_pixel_conv(const PixelConvArguments* args) { return guarded(args, convolve); }
