// Entry points of the selective scan: makes the plan, hands its tasks to threads, sums partial gradients.
#define LONGLLAVA_FORM entry
#include "entry.h"
#include "selective_scan.h"

using namespace longllava;

namespace {

double nanoseconds(const ScanArguments& a) { return double(a.batch) * a.length * a.channels * a.states / 2; }

}  // namespace

// Number of fp32 values that forward writes to `checkpoints`: the state before every SCAN_CHUNK tokens.
LONGLLAVA_EXPORT int64_t longllava_scan_checkpoints(int64_t batch, int64_t length, int64_t channels, int64_t states) {
  return batch * ceil_div(length, SCAN_CHUNK) * ceil_div(channels, 16) * 16 * states;
}

// Both return 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_scan_forward(const ScanArguments* args) {
  return guarded(args, [](const ScanArguments& a) {
    ScanPlan plan{};
    plan.args = a;
    const std::vector<uint8_t> flags = token_flags(a.seq_idx, a.batch, a.length);
    plan.flags = flags.empty() ? nullptr : flags.data();
    const int threads = useful_threads(a.threads, nanoseconds(a));
    const int64_t most = std::min<int64_t>(SCAN_MAX_TILE, SCAN_TILE_STATES / std::max<int64_t>(a.states, 1) / 16 * 16);
    plan.tile = tile_channels(a.batch, a.channels, threads, SCAN_MIN_TILE, most);
    plan.n_tiles = ceil_div(a.channels, plan.tile);
    parallel_for(a.batch * plan.n_tiles, threads, LONGLLAVA_PICK(scan_forward_task), &plan);
  });
}

LONGLLAVA_EXPORT int longllava_scan_backward(const ScanArguments* args) {
  return guarded(args, [](const ScanArguments& a) {
    ScanPlan plan{};
    plan.args = a;
    const std::vector<uint8_t> flags = token_flags(a.seq_idx, a.batch, a.length);
    plan.flags = flags.empty() ? nullptr : flags.data();
    plan.tile = SCAN_BACKWARD_TILE;
    plan.n_tiles = ceil_div(a.channels, plan.tile);
    // enough tasks for many threads, however small the batch; never dependent on the number of threads
    const int64_t wanted = ceil_div(2 * SCAN_MAX_SLICES, std::max<int64_t>(a.batch, 1));
    plan.n_slices = std::min({plan.n_tiles, wanted, int64_t(SCAN_MAX_SLICES)});
    std::vector<float> partial_A(a.batch * a.channels * a.states);
    std::vector<float> partial_D(a.batch * a.channels), partial_bias(a.batch * a.channels);
    const int64_t n_partial = plan.n_slices * a.batch * a.length * a.states;
    std::vector<float> partial_B(n_partial), partial_C(n_partial);
    plan.partial_A = partial_A.data();
    plan.partial_B = partial_B.data();
    plan.partial_C = partial_C.data();
    plan.partial_D = partial_D.data();
    plan.partial_bias = partial_bias.data();
    const int threads = useful_threads(a.threads, 2 * nanoseconds(a));
    parallel_for(a.batch * plan.n_slices, threads, LONGLLAVA_PICK(scan_backward_task), &plan);
    parallel_for(a.batch * ceil_div(a.length, SCAN_REDUCE_ROWS), threads, LONGLLAVA_PICK(scan_reduce_task), &plan);
    sum_over_batch(partial_A, a.batch, a.channels * a.states, a.grad_A);
    sum_over_batch(partial_D, a.batch, a.channels, a.grad_D);
    sum_over_batch(partial_bias, a.batch, a.channels, a.grad_bias);
  });
}
