// Attention: how a call is cut into tasks, and how the parts of split keys are merged. The kernels' form is in
// attention_forward.h, attention_few_rows_kernels.cpp and attention_backward_walk.h.
//
// The cut depends on the shapes alone, never on the number of threads, so neither do the results.
#include "attention.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "attention_plan.h"
#include "threads.h"

#if defined(__x86_64__)
namespace longllava {
namespace avx512bf16 {
void attention_tile(const AttentionCall& call, int64_t index);
}
namespace avx512amx {
void attention_tile(const AttentionCall& call, int64_t index);
}
}  // namespace longllava
#endif

namespace longllava {
namespace {

constexpr int64_t FEW_ROWS = 8;           // up to here a dot product per key beats a tile of mostly empty lanes
constexpr int64_t TILE_ROWS = 240;        // whole panels in AVX2 (24 rows) and AVX-512 (48)
constexpr int64_t MIN_TILE_ROWS = 48;
constexpr int64_t WANTED_TASKS = 16;      // with fewer, keys are split, and tiles shrink where they are too few for that
constexpr int64_t MANY_KEYS = 8192;       // from which tiles and blocks are twice as large: each tile reads all keys,
                                          // from memory where they are so many. 6 to 8 % less time at 36,864
constexpr int64_t MIN_SPLIT_KEYS = 1024;  // merging a part costs less than 1 % of what it holds

typedef void (*Kernel)(const AttentionCall&, int64_t);

void plan_forward(AttentionCall& call) {
  const int64_t groups = call.batch * call.n_groups;
  const bool few = call.n_queries * call.heads_per_group <= FEW_ROWS;
  const bool many_keys = !few && call.n_keys >= MANY_KEYS;
  call.key_block = many_keys ? 2 * KEY_BLOCK : KEY_BLOCK;
  const int64_t tile_rows = many_keys ? 2 * TILE_ROWS : TILE_ROWS;
  call.tile_queries = few ? call.n_queries : std::clamp<int64_t>(tile_rows / call.heads_per_group, 1, call.n_queries);
  const int64_t most_splits = std::max<int64_t>(1, call.n_keys / MIN_SPLIT_KEYS);
  const auto n_tiles = [&] { return (call.n_queries + call.tile_queries - 1) / call.tile_queries; };
  while (!few && groups * n_tiles() * most_splits < WANTED_TASKS && call.tile_queries > 1 &&
         call.tile_queries * call.heads_per_group > MIN_TILE_ROWS)
    call.tile_queries = (call.tile_queries + 1) / 2;
  call.n_tiles = n_tiles();
  const int64_t tasks = groups * call.n_tiles;
  const int64_t splits = std::min(most_splits, (WANTED_TASKS + tasks - 1) / tasks);
  const int64_t keys = std::max<int64_t>(1, (call.n_keys + splits - 1) / splits);
  call.split_keys = (keys + call.key_block - 1) / call.key_block * call.key_block;
  call.n_splits = std::max<int64_t>(1, (call.n_keys + call.split_keys - 1) / call.split_keys);
}

Kernel pick_forward(const AttentionCall& call, bool bf16) {
  const bool few = call.n_queries * call.heads_per_group <= FEW_ROWS;
  if (few) return bf16 ? LONGLLAVA_PICK(attention_few_rows_bf16) : LONGLLAVA_PICK(attention_few_rows_float);
#if defined(__x86_64__)
#if defined(LONGLLAVA_HAS_AMX)
  if (bf16 && has_amx() && call.scale > 0) return avx512amx::attention_tile;  // scores are scaled after their maximum
#endif
  if (bf16 && has_avx512_bf16()) return avx512bf16::attention_tile;
#endif
  return bf16 ? LONGLLAVA_PICK(attention_tile_bf16) : LONGLLAVA_PICK(attention_tile_float);
}

// One (batch, group, tile): adds up what its splits found, each scaled to the common maximum.
template <class Output>
void merge_splits(const AttentionCall& call, int64_t index) {
  const AttentionTask task = forward_task(call, index * call.n_splits);
  const int64_t width = call.head_dim, tile_rows = call.tile_queries * call.heads_per_group;
  std::vector<float> sums(width);
  for (int64_t row = 0; row < task.n_rows; ++row) {
    const float* parts = call.partial + (index * call.n_splits * tile_rows + row) * (width + 2);
    const int64_t step = tile_rows * (width + 2);
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t i = 0; i < call.n_splits; ++i) top = std::max(top, parts[i * step + width]);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t i = 0; i < call.n_splits; ++i) {
      const float* part = parts + i * step;
      if (part[width + 1] == 0) continue;  // this part saw no key
      const float scale = exp2f(part[width] - top);
      total += part[width + 1] * scale;
      for (int64_t d = 0; d < width; ++d) sums[d] += part[d] * scale;
    }
    const int64_t query = task.first_query + row / call.heads_per_group;
    const int64_t head = task.group * call.heads_per_group + row % call.heads_per_group;
    const AttentionStrides& strides = call.y_strides;
    Output* y = static_cast<Output*>(call.y) + task.batch * strides.batch + query * strides.token + head * strides.head;
    for (int64_t d = 0; d < width; ++d) store_rounded(y + d, total == 0 ? 0 : sums[d] / total);
    if (call.lse != nullptr)
      call.lse[(task.batch * call.n_queries + query) * call.n_heads + head] =
          total == 0 ? -std::numeric_limits<float>::infinity() : (top + log2f(total)) * 0.693147180559945f;
  }
}

struct ForwardRun {
  AttentionCall call;
  Kernel kernel, merge;
};

void run_forward(const AttentionArguments& from) {
  ForwardRun run{};
  AttentionCall& call = run.call;
  read_arguments(call, from);
  if (call.batch == 0 || call.n_queries == 0) return;
  plan_forward(call);
  std::vector<KeyRange> ranges = key_ranges(call);
  call.key_ranges = call.seq_k == nullptr ? nullptr : ranges.data();
  std::vector<float> partial;
  if (call.n_splits > 1)
    partial.resize(call.n_tasks() * call.tile_queries * call.heads_per_group * (call.head_dim + 2));
  call.partial = partial.data();
  run.kernel = pick_forward(call, from.bf16 != 0);
  run.merge = from.bf16 ? merge_splits<uint16_t> : merge_splits<float>;
  const int n_threads = useful_threads(call, static_cast<int>(from.n_threads));
  parallel_for(call.n_tasks(), n_threads, [](void* context, int64_t i) {
    const ForwardRun& self = *static_cast<ForwardRun*>(context);
    self.kernel(self.call, i);
  }, &run);
  if (call.n_splits > 1)
    parallel_for(call.n_tasks() / call.n_splits, call.n_queries > FEW_ROWS ? n_threads : 1, [](void* context, int64_t i) {
      const ForwardRun& self = *static_cast<ForwardRun*>(context);
      self.merge(self.call, i);
    }, &run);
}

}  // namespace
}  // namespace longllava

// Writes y, and lse if its address is given. Returns 0; 1: out of memory; 2: the caller's struct is another one.
LONGLLAVA_EXPORT int longllava_attention_forward(const longllava::AttentionArguments* arguments) {
  if (arguments->size != sizeof *arguments) return 2;
  try {
    longllava::run_forward(*arguments);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
