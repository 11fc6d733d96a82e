// Entry point of the 3 x 3 convolution: makes the plan and hands its tasks to threads.
#define LONGLLAVA_FORM entry
#include "conv3x3.h"
#include "entry.h"
#include "memory.h"

using namespace longllava;

namespace {

constexpr int64_t GROUP_BYTES = 448 << 10;  // of a worker's memory: most of a second-level cache of 512 KB

void convolve(const Conv3x3Arguments& a) {
  Conv3x3Plan plan{};
  plan.args = a;
  plan.tiles_down = ceil_div(a.height, CONV3X3_SIDE);
  plan.tiles_across = ceil_div(a.width, CONV3X3_SIDE);
  plan.n_tiles = a.batch * plan.tiles_down * plan.tiles_across;
  if (plan.n_tiles == 0) return;
  const double products = double(plan.n_tiles) * CONV3X3_POINTS * a.inputs * a.outputs;
  const int threads = useful_threads(a.threads, products / 40);
  const int64_t tile_bytes = 4 * CONV3X3_POINTS * (a.inputs + PANEL);
  const int64_t most = std::min(GROUP_BYTES / tile_bytes, ceil_div(plan.n_tiles, threads));
  plan.group = std::max<int64_t>(1, most / CONV3X3_TILES) * CONV3X3_TILES;
  const Memory weight = memory(4 * CONV3X3_POINTS * plan.weight_pitch() * (a.outputs / PANEL));
  plan.weight = reinterpret_cast<float*>(weight.get());
  plan.slot_bytes = ceil_div(4 * plan.slot_floats(), 64) * 64;
  const Memory slots = memory(threads * plan.slot_bytes);
  plan.slots = slots.get();
  parallel_for(a.outputs / PANEL, threads, LONGLLAVA_PICK(conv3x3_weight_task), &plan);
  parallel_for(threads, threads, LONGLLAVA_PICK(conv3x3_worker), &plan);
}

}  // namespace

// Returns 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_conv3x3(const Conv3x3Arguments* args) { return guarded(args, convolve); }
