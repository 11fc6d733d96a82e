// Entry points of the selective scan: makes the plan, hands its tasks to threads, sums partial gradients.
#define LONGLLAVA_FORM entry
#include "selective_scan.h"

#include <algorithm>
#include <new>
#include <vector>

#include "threads.h"

namespace longllava {
namespace {

// A change of value between two real tokens resets; padding between them does not.
std::vector<uint8_t> token_flags(const int32_t* seq_idx, int64_t batch, int64_t length) {
  std::vector<uint8_t> flags(batch * length);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t last = -1;
    for (int64_t t = b * length; t < (b + 1) * length; ++t) {
      const int32_t now = seq_idx[t];
      flags[t] = now < 0 ? TOKEN_PADDING : last >= 0 && now != last ? TOKEN_RESET : TOKEN_PLAIN;
      if (now >= 0) last = now;
    }
  }
  return flags;
}

// One thread per 100 us of work, at some 2 state-elements a nanosecond: less does not pay for starting it.
int useful_threads(const ScanArguments& a) {
  const double work = double(a.batch) * a.length * a.channels * a.states / 2e5;
  return static_cast<int>(std::max(1.0, std::min(double(a.threads), work)));
}

// out (n) = the sum of partial (batch, n) over its rows, in order
void sum_over_batch(const std::vector<float>& partial, int64_t batch, int64_t n, float* out) {
  if (out == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0;
    for (int64_t b = 0; b < batch; ++b) sum += partial[b * n + i];
    out[i] = sum;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace longllava

using namespace longllava;

// Number of fp32 values that forward writes to `checkpoints`: the state before every SCAN_CHUNK tokens.
LONGLLAVA_EXPORT int64_t longllava_scan_checkpoints(int64_t batch, int64_t length, int64_t channels, int64_t states) {
  return batch * ceil_div(length, SCAN_CHUNK) * ceil_div(channels, 16) * 16 * states;
}

// Both return 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_scan_forward(const ScanArguments* args) {
  if (args->bytes != sizeof(ScanArguments)) return 2;
  try {
    ScanPlan plan{};
    plan.args = *args;
    std::vector<uint8_t> flags;
    if (args->seq_idx != nullptr) {
      flags = token_flags(args->seq_idx, args->batch, args->length);
      plan.flags = flags.data();
    }
    const int threads = useful_threads(*args);
    const int64_t two_per_thread = args->batch * args->channels / (2 * threads) / 16 * 16;
    plan.tile = std::clamp<int64_t>(two_per_thread, SCAN_MIN_TILE, SCAN_MAX_TILE);
    plan.n_tiles = ceil_div(args->channels, plan.tile);
    parallel_for(args->batch * plan.n_tiles, threads, LONGLLAVA_PICK(scan_forward_task), &plan);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

LONGLLAVA_EXPORT int longllava_scan_backward(const ScanArguments* args) {
  if (args->bytes != sizeof(ScanArguments)) return 2;
  try {
    const ScanArguments& a = *args;
    ScanPlan plan{};
    plan.args = a;
    std::vector<uint8_t> flags;
    if (a.seq_idx != nullptr) {
      flags = token_flags(a.seq_idx, a.batch, a.length);
      plan.flags = flags.data();
    }
    plan.tile = SCAN_BACKWARD_TILE;
    plan.n_tiles = ceil_div(a.channels, plan.tile);
    // enough tasks for many threads, however small the batch; never dependent on the number of threads
    const int64_t wanted = ceil_div(2 * SCAN_MAX_SLICES, std::max<int64_t>(a.batch, 1));
    plan.n_slices = std::min({plan.n_tiles, wanted, int64_t(SCAN_MAX_SLICES)});
    std::vector<float> partial_A(a.batch * a.channels * a.states), partial_D(a.batch * a.channels),
        partial_bias(a.batch * a.channels);
    const int64_t n_partial = plan.n_slices * a.batch * a.length * a.states;
    std::vector<float> partial_B(n_partial), partial_C(n_partial);
    plan.partial_A = partial_A.data();
    plan.partial_B = partial_B.data();
    plan.partial_C = partial_C.data();
    plan.partial_D = partial_D.data();
    plan.partial_bias = partial_bias.data();
    const int threads = useful_threads(a);
    parallel_for(a.batch * plan.n_slices, threads, LONGLLAVA_PICK(scan_backward_task), &plan);
    parallel_for(a.batch * ceil_div(a.length, SCAN_REDUCE_ROWS), threads, LONGLLAVA_PICK(scan_reduce_task), &plan);
    sum_over_batch(partial_A, a.batch, a.channels * a.states, a.grad_A);
    sum_over_batch(partial_D, a.batch, a.channels, a.grad_D);
    sum_over_batch(partial_bias, a.batch, a.channels, a.grad_bias);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
