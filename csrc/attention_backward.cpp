// Gradients of attention: how a call is cut into tasks. The kernels' form is in attention_backward_walk.h.
//
// As in the forward pass the cut depends on the shapes alone.
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "attention_plan.h"
#include "threads.h"

#if defined(__x86_64__)
namespace longllava {
namespace avx512amx {
void attention_backward(const AttentionBackwardCall& call, int64_t index);
}
}  // namespace longllava
#endif

namespace longllava {
namespace {

constexpr int64_t TILE_ROWS = 96;
constexpr int64_t CHUNK_NUMBERS = 512 * 64;         // keys x channels of a chunk: k, v and their gradients take 512 KiB
constexpr int64_t WANTED_TASKS = 16;
[[maybe_unused]] constexpr int64_t AMX_ROWS = 32;   // a panel of its tiles
constexpr int64_t MOST_PARTS_BYTES = 256ll << 20;   // for the lanes' parts of q's gradient, beyond the first

typedef void (*Kernel)(const AttentionBackwardCall&, int64_t);

void plan_backward(AttentionBackwardCall& call) {
  call.tile_queries = std::max<int64_t>(1, TILE_ROWS / call.heads_per_group);
  call.n_tiles = (call.n_queries + call.tile_queries - 1) / call.tile_queries;
  call.chunk_keys = std::max(KEY_BLOCK, CHUNK_NUMBERS / call.head_dim / KEY_BLOCK * KEY_BLOCK);
  call.chunk_keys = std::min(call.chunk_keys, 64 * KEY_BLOCK);
  call.n_chunks = (call.n_keys + call.chunk_keys - 1) / call.chunk_keys;
  const int64_t tasks = call.batch * call.n_groups;
  const int64_t part_bytes = 4 * call.batch * call.n_queries * call.n_heads * call.head_dim;
  const int64_t most = std::min(call.n_chunks, 1 + MOST_PARTS_BYTES / std::max<int64_t>(1, part_bytes));
  call.n_lanes = std::max<int64_t>(1, std::min((WANTED_TASKS + tasks - 1) / tasks, most));
}

Kernel pick_backward(const AttentionBackwardCall& call, bool bf16) {
#if defined(LONGLLAVA_HAS_AMX)
  // fewer rows would leave tiles empty, and sums of few terms show more of the rounding of ds
  if (bf16 && has_amx() && call.n_queries * call.heads_per_group >= AMX_ROWS) return avx512amx::attention_backward;
#endif
  return bf16 ? LONGLLAVA_PICK(attention_backward_bf16) : LONGLLAVA_PICK(attention_backward_float);
}

struct BackwardRun {
  AttentionBackwardCall call;
  Kernel kernel;
  Kernel add;
};

// grad_q of one (batch, group, tile): the lanes' parts, in order, times the scale.
template <class Output>
void add_parts(const AttentionBackwardCall& call, int64_t index) {
  const int64_t tile = index % call.n_tiles, group = index / call.n_tiles % call.n_groups;
  const int64_t batch = index / call.n_tiles / call.n_groups;
  const int64_t part_size = call.batch * call.n_queries * call.n_heads * call.head_dim;
  const AttentionStrides& strides = call.grad_q_strides;
  std::vector<float> sums(call.head_dim);
  const int64_t end = std::min(call.n_queries, (tile + 1) * call.tile_queries);
  for (int64_t query = tile * call.tile_queries; query < end; ++query) {
    for (int64_t head = group * call.heads_per_group; head < (group + 1) * call.heads_per_group; ++head) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t lane = 0; lane < call.n_lanes; ++lane) {
        if (!call.touched[call.touched_place(lane, batch, group, tile)]) continue;
        const int64_t row = (batch * call.n_queries + query) * call.n_heads + head;
        const float* part = call.grad_q_parts + lane * part_size + row * call.head_dim;
        for (int64_t d = 0; d < call.head_dim; ++d) sums[d] += part[d];
      }
      Output* target = static_cast<Output*>(call.grad_q) + batch * strides.batch + query * strides.token + head * strides.head;
      for (int64_t d = 0; d < call.head_dim; ++d) store_rounded(target + d, sums[d] * call.scale);
    }
  }
}

void run_backward(const AttentionArguments& from) {
  BackwardRun run{};
  AttentionBackwardCall& call = run.call;
  read_arguments(call, from);
  if (call.batch == 0) return;
  call.grad_y = from.grad_y.start, call.grad_y_strides = from.grad_y.strides;
  call.grad_q = from.grad_q.start, call.grad_q_strides = from.grad_q.strides;
  call.grad_k = from.grad_k.start, call.grad_k_strides = from.grad_k.strides;
  call.grad_v = from.grad_v.start, call.grad_v_strides = from.grad_v.strides;
  call.grad_lse = from.grad_lse;
  plan_backward(call);
  std::vector<KeyRange> ranges = key_ranges(call);
  call.key_ranges = call.seq_k == nullptr ? nullptr : ranges.data();
  std::vector<uint8_t> touched(call.n_lanes * call.batch * call.n_groups * call.n_tiles);
  call.touched = touched.data();
  // calloc: pages that no lane touches are never brought in
  const int64_t parts_size = call.n_lanes * call.batch * call.n_queries * call.n_heads * call.head_dim;
  const std::unique_ptr<float, void (*)(void*)> parts(static_cast<float*>(calloc(parts_size + 1, sizeof(float))), free);
  if (parts == nullptr) throw std::bad_alloc();
  call.grad_q_parts = parts.get();
  run.add = from.bf16 ? add_parts<uint16_t> : add_parts<float>;
  run.kernel = pick_backward(call, from.bf16);
  const int n_threads = useful_threads(call, static_cast<int>(from.n_threads));
  parallel_for(call.batch * call.n_groups * call.n_lanes, n_threads, [](void* context, int64_t i) {
    const BackwardRun& self = *static_cast<BackwardRun*>(context);
    self.kernel(self.call, i);
  }, &run);
  parallel_for(call.batch * call.n_groups * call.n_tiles, n_threads, [](void* context, int64_t i) {
    const BackwardRun& self = *static_cast<BackwardRun*>(context);
    self.add(self.call, i);
  }, &run);
}

}  // namespace
}  // namespace longllava

// Writes grad_q, grad_k and grad_v. Needs y and lse as the forward pass wrote them. Returns as the forward entry does.
LONGLLAVA_EXPORT int longllava_attention_backward(const longllava::AttentionArguments* arguments) {
  if (arguments->size != sizeof *arguments) return 2;
  try {
    longllava::run_backward(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
