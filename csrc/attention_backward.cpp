// Gradients of attention: how a call is cut into tasks. The kernels' form is in attention_backward_kernels.cpp.
//
// As in the forward pass the cut depends on the shapes alone.
#include <algorithm>
#include <new>
#include <vector>

#include "attention_plan.h"
#include "threads.h"

namespace longllava {
namespace {

constexpr int64_t TILE_ROWS = 96;
constexpr int64_t CHUNK_NUMBERS = 512 * 64;         // keys x channels of a chunk: k, v and their gradients take 512 KiB
constexpr int64_t WANTED_TASKS = 16;
constexpr int64_t MOST_PARTS_BYTES = 256ll << 20;   // for the lanes' parts of q's gradient, beyond the first

typedef void (*Kernel)(const AttentionBackwardCall&, int64_t);

void plan_backward(AttentionBackwardCall& call) {
  call.tile_queries = std::max<int64_t>(1, TILE_ROWS / call.heads_per_group);
  call.chunk_keys = std::max(KEY_BLOCK, CHUNK_NUMBERS / call.head_dim / KEY_BLOCK * KEY_BLOCK);
  call.chunk_keys = std::min(call.chunk_keys, 64 * KEY_BLOCK);
  call.n_chunks = (call.n_keys + call.chunk_keys - 1) / call.chunk_keys;
  const int64_t tasks = call.batch * call.n_groups;
  const int64_t part_bytes = 4 * call.batch * call.n_queries * call.n_heads * call.head_dim;
  const int64_t most = std::min(call.n_chunks, 1 + MOST_PARTS_BYTES / std::max<int64_t>(1, part_bytes));
  call.n_lanes = std::max<int64_t>(1, std::min((WANTED_TASKS + tasks - 1) / tasks, most));
}

struct BackwardRun {
  AttentionBackwardCall call;
  Kernel kernel;
  bool bf16;
};

// grad_q of one (batch, query): the lanes' parts, in order, times the scale.
void add_parts(const AttentionBackwardCall& call, bool bf16, int64_t index) {
  const int64_t batch = index / call.n_queries, query = index % call.n_queries;
  const int64_t part_size = call.batch * call.n_queries * call.n_heads * call.head_dim;
  const AttentionStrides& strides = call.grad_q_strides;
  for (int64_t head = 0; head < call.n_heads; ++head) {
    const float* parts = call.grad_q_parts + (index * call.n_heads + head) * call.head_dim;
    const int64_t place = batch * strides.batch + query * strides.token + head * strides.head;
    for (int64_t d = 0; d < call.head_dim; ++d) {
      float sum = 0;
      for (int64_t lane = 0; lane < call.n_lanes; ++lane) sum += parts[lane * part_size + d];
      if (bf16) {
        store_rounded(static_cast<uint16_t*>(call.grad_q) + place + d, sum * call.scale);
      } else {
        store_rounded(static_cast<float*>(call.grad_q) + place + d, sum * call.scale);
      }
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
  std::vector<float> parts(call.n_lanes * call.batch * call.n_queries * call.n_heads * call.head_dim);
  call.grad_q_parts = parts.data();
  run.bf16 = from.bf16 != 0;
  run.kernel = run.bf16 ? LONGLLAVA_PICK(attention_backward_bf16) : LONGLLAVA_PICK(attention_backward_float);
  const int n_threads = useful_threads(call, static_cast<int>(from.n_threads));
  parallel_for(call.batch * call.n_groups * call.n_lanes, n_threads, [](void* context, int64_t i) {
    const BackwardRun& self = *static_cast<BackwardRun*>(context);
    self.kernel(self.call, i);
  }, &run);
  parallel_for(call.batch * call.n_queries, n_threads, [](void* context, int64_t i) {
    const BackwardRun& self = *static_cast<BackwardRun*>(context);
    add_parts(self.call, self.bf16, i);
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
