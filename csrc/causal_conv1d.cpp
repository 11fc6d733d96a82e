// Entry points of the causal convolution: makes the plan, hands its tasks to threads, sums gradients over the batch.
#define LONGLLAVA_FORM entry
#include "causal_conv1d.h"
#include "entry.h"

using namespace longllava;

namespace {

void run(const ConvArguments& a, ConvPlan& plan, double nanoseconds, void (*task)(void*, int64_t)) {
  plan.args = a;
  const std::vector<uint8_t> flags = token_flags(a.seq_idx, a.batch, a.length);
  plan.flags = flags.empty() ? nullptr : flags.data();
  const int threads = useful_threads(a.threads, nanoseconds * a.batch * a.length * a.channels);
  plan.tile = tile_channels(a.batch, a.channels, threads, CONV_MIN_TILE, CONV_MAX_TILE);
  plan.n_tiles = ceil_div(a.channels, plan.tile);
  parallel_for(a.batch * plan.n_tiles, threads, task, &plan);
}

}  // namespace

// Both return 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_conv_forward(const ConvArguments* args) {
  return guarded(args, [](const ConvArguments& a) {
    ConvPlan plan{};
    run(a, plan, 1.0, LONGLLAVA_PICK(conv_forward_task));
  });
}

LONGLLAVA_EXPORT int longllava_conv_backward(const ConvArguments* args) {
  return guarded(args, [](const ConvArguments& a) {
    ConvPlan plan{};
    std::vector<float> partial_weight(a.batch * a.channels * a.kernel), partial_bias(a.batch * a.channels);
    plan.partial_weight = partial_weight.data();
    plan.partial_bias = partial_bias.data();
    run(a, plan, 3.0, LONGLLAVA_PICK(conv_backward_task));
    sum_over_batch(partial_weight, a.batch, a.channels * a.kernel, a.grad_weight);
    sum_over_batch(partial_bias, a.batch, a.channels, a.grad_bias);
  });
}
