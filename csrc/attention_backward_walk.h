// Gradients of attention (Dao et al. 2022, arXiv:2205.14135, Alg. 4), p recomputed from lse block by block.
//
//     p = 2^(scale log2(e) q.k - lse log2(e))      dp = grad_y . v      ds = p (dp - grad_y . y + grad_lse)
//     grad_v += p grad_y      grad_k += scale ds q      grad_q += scale ds k
// A task walks chunks of keys: the chunk's k and v and their gradients stay in the cache while tiles of TILE rows pass
// by. Rows lie in the lanes for the scores, dp and grad_q (as in attention_forward.h); for grad_k and grad_v the
// channels do. How the five products are taken is the business of Blocks: attention_backward_kernels.cpp in fp32,
// whatever the input, attention_backward_amx_kernels.cpp of bf16 by tiles.
#pragma once

#include "attention_products.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int64_t TILE = 96;  // rows: whole panels in AVX2 (24), AVX-512 (48) and AMX (32)

// What every Blocks has, and the walk fills or reads.
struct BackwardWork {
  int64_t width, k_width, stride;  // channels; in whole tile heights; of a row of grad_k and grad_v
  float *grad_k, *grad_v;          // of the chunk: [key][channel]
  // of a tile's rows:
  float *log2_sums, *offsets;      // lse in base 2; grad_y . y - grad_lse
  float* grad_q;                   // panels: [channel][row]
  int32_t *ends, *ids;

  static int64_t floats(const AttentionBackwardCall& call, int64_t k_width, int64_t stride) {
    return 2 * call.chunk_keys * stride + TILE * k_width + 4 * TILE + 128;
  }
  BackwardWork(const AttentionBackwardCall& call, Scratch& scratch, int64_t of_k, int64_t of_gradients)
      : width(call.head_dim), k_width(of_k), stride(of_gradients) {
    grad_k = scratch.get<float>(call.chunk_keys * stride);
    grad_v = scratch.get<float>(call.chunk_keys * stride);
    log2_sums = scratch.get<float>(TILE);
    offsets = scratch.get<float>(TILE);
    grad_q = scratch.get<float>(TILE * k_width);
    ends = scratch.get<int32_t>(TILE);
    ids = scratch.get<int32_t>(TILE);
  }
};

// One block of keys against one panel of rows.
struct PanelOfBlock {
  int64_t start, n_vectors;         // rows
  int64_t first, in_chunk;          // the block's first key: of all, of the chunk
  int64_t n_block, n_keys;          // its keys, and in whole tile heights
  const int32_t* key_ids;           // or null
  bool masked;
};

// A tile's rows, as the products want them, and what of them is known before.
template <class Input, class Blocks>
LONGLLAVA_INLINE void open_tile(Blocks& blocks, const AttentionBackwardCall& call, const AttentionTask& task,
                                const Panels& rows) {
  const int64_t width = call.head_dim;
  for (int64_t i = 0; i < rows.n_vectors * WIDTH * blocks.k_width; ++i) blocks.grad_q[i] = 0;
  for (int64_t row = 0; row < rows.n_vectors * WIDTH; ++row) {
    const float lse = row < task.n_rows ? call.lse[row_number(call, task, row)] : NEGATIVE_INFINITY;
    blocks.log2_sums[row] = 0;
    blocks.offsets[row] = 0;
    if (lse == NEGATIVE_INFINITY) {  // the row sees nothing: it has no part in any gradient, whatever it holds
      blocks.template take_row<Input>(row, nullptr, nullptr);
      continue;
    }
    const Input* grad_y = row_of<const Input>(call.grad_y, call.grad_y_strides, call, task, row);
    blocks.template take_row<Input>(row, row_of<const Input>(call.q, call.q_strides, call, task, row), grad_y);
    const Input* y = row_of<const Input>(call.y, call.y_strides, call, task, row);
    vec sums{};
    int64_t d = 0;
    for (; d + WIDTH <= width; d += WIDTH) sums += load(y + d) * load(grad_y + d);
    float sum = sum_lanes(sums);
    for (; d < width; ++d) sum += load_one(y + d) * load_one(grad_y + d);
    blocks.offsets[row] = sum - (call.grad_lse == nullptr ? 0 : call.grad_lse[row_number(call, task, row)]);
    blocks.log2_sums[row] = lse * LOG2_E;
  }
  blocks.pack(rows);
}

// One block of keys against one tile of rows. Rows of panels that see nothing of it count as 0.
template <class Blocks>
LONGLLAVA_INLINE void differentiate_block(Blocks& blocks, const AttentionBackwardCall& call, const AttentionTask& task,
                                          const Panels& rows, int64_t chunk_start, int64_t first) {
  const KeyRange* range = key_range(call, task, first);
  const int64_t n_left = call.n_keys - first;
  PanelOfBlock part{};
  part.first = first, part.in_chunk = first - chunk_start;
  part.n_block = n_left < KEY_BLOCK ? n_left : KEY_BLOCK;
  part.n_keys = round_up(part.n_block, TILE_HEIGHT);
  part.key_ids = call.seq_k == nullptr ? nullptr : call.seq_k + task.batch * call.n_keys + first;
  int64_t from = rows.n_vectors * WIDTH, to = 0;  // the rows that see something of the block
  for (int64_t panel = 0; panel < rows.n_panels; ++panel) {
    const int64_t start = rows.start(panel) * WIDTH, end = rows.start(panel + 1) * WIDTH;
    const PanelView view(blocks.ends + start, blocks.ids + start, (end < task.n_rows ? end : task.n_rows) - start);
    if (view.last_end <= first || (range != nullptr && !view.may_see(*range))) {
      if (to > 0) blocks.clear(start, end, part.n_keys);
      continue;
    }
    if (to == 0) from = start;
    to = end;
    part.start = start, part.n_vectors = rows.start(panel + 1) - rows.start(panel);
    part.masked = view.first_end < first + part.n_keys || (range != nullptr && !view.sees_all(*range));
    blocks.differentiate(part, call.scale * LOG2_E);
  }
  if (to > 0) blocks.add_to_keys(part.in_chunk, part.n_keys, from, to);
}

// The tile's part of q's gradient, its rows side by side in squares, to the lane's.
LONGLLAVA_INLINE void add_to_queries(const BackwardWork& work, const AttentionBackwardCall& call,
                                     const AttentionTask& task, const Panels& rows, float* grad_q_part) {
  for (int64_t panel = 0; panel < rows.n_panels; ++panel) {
    const int64_t from = rows.start(panel) * WIDTH, n = rows.start(panel + 1) * WIDTH - from;
    for (int64_t first = from; first < from + n && first < task.n_rows; first += WIDTH)
      for (int64_t d = 0; d < work.width; d += WIDTH) {
        const int64_t left = work.width - d, n_channels = left < WIDTH ? left : WIDTH;
        vec square[WIDTH];
        for (int i = 0; i < WIDTH; ++i)
          square[i] = i < n_channels ? load(work.grad_q + from * work.k_width + (d + i) * n + first - from) : vec{};
        transpose(square);
        for (int64_t row = first; row < first + WIDTH && row < task.n_rows; ++row) {
          float* target = grad_q_part + row_number(call, task, row) * work.width + d;
          if (n_channels == WIDTH) store(target, load(target) + square[row - first]);
          else store_some(target, load_some(target, int(n_channels)) + square[row - first], int(n_channels));
        }
      }
  }
}

// The chunk's part of k's or v's gradient, which no other task has a part in.
template <class Output>
LONGLLAVA_INLINE void store_keys(void* target, const AttentionStrides& strides, const AttentionTask& task,
                                 int64_t start, int64_t end, const float* sums, const BackwardWork& work, float scale) {
  Output* rows = static_cast<Output*>(target) + task.batch * strides.batch + task.group * strides.head;
  for (int64_t key = start; key < end; ++key, sums += work.stride) {
    Output* row = rows + key * strides.token;
    int64_t d = 0;
    for (; d + WIDTH <= work.width; d += WIDTH) store(row + d, load(sums + d) * scale);
    if (d < work.width) store_some(row + d, load(sums + d) * scale, int(work.width - d));
  }
}

template <class Input, class Blocks>
void differentiate_chunks(const AttentionBackwardCall& call, int64_t index) {
  AttentionTask task{};
  const int64_t lane = index % call.n_lanes;
  task.group = index / call.n_lanes % call.n_groups;
  task.batch = index / call.n_lanes / call.n_groups;
  task.end_key = call.n_keys;
  const int64_t width = call.head_dim;
  Scratch scratch(Blocks::floats(call));
  Blocks blocks(call, scratch);

  const AttentionStrides &k_strides = call.k_strides, &v_strides = call.v_strides;
  const Input* k = static_cast<const Input*>(call.k) + task.batch * k_strides.batch + task.group * k_strides.head;
  const Input* v = static_cast<const Input*>(call.v) + task.batch * v_strides.batch + task.group * v_strides.head;
  float* grad_q_part = call.grad_q_parts + lane * call.batch * call.n_queries * call.n_heads * width;

  for (int64_t chunk = lane; chunk < call.n_chunks; chunk += call.n_lanes) {
    const int64_t start = chunk * call.chunk_keys;
    const int64_t end = start + call.chunk_keys < call.n_keys ? start + call.chunk_keys : call.n_keys;
    for (int64_t first = start; first < end; first += KEY_BLOCK) {
      const int64_t n = end - first < KEY_BLOCK ? end - first : KEY_BLOCK;
      const int32_t* ids = call.seq_k == nullptr ? nullptr : call.seq_k + task.batch * call.n_keys + first;
      blocks.stage(first - start, k + first * k_strides.token, k_strides.token, v + first * v_strides.token,
                   v_strides.token, n, ids);
    }
    for (int64_t i = 0; i < call.chunk_keys * blocks.stride; ++i) blocks.grad_k[i] = blocks.grad_v[i] = 0;

    for (int64_t query = 0; query < call.n_queries; query += call.tile_queries) {
      task.first_query = query;
      task.n_queries = call.n_queries - query < call.tile_queries ? call.n_queries - query : call.tile_queries;
      task.n_rows = task.n_queries * call.heads_per_group;
      if (call.end_of_keys(query + task.n_queries - 1) <= start) continue;
      const Panels rows(round_up(task.n_rows, Blocks::ROWS));
      describe_rows(call, task, rows.n_vectors * WIDTH, blocks.ends, blocks.ids);
      const PanelView view(blocks.ends, blocks.ids, task.n_rows);
      bool opened = false;
      for (int64_t first = start; first < end && first < view.last_end; first += KEY_BLOCK) {
        const KeyRange* range = key_range(call, task, first);
        if (range != nullptr && !view.may_see(*range)) continue;
        if (!opened) open_tile<Input>(blocks, call, task, rows);
        opened = true;
        differentiate_block(blocks, call, task, rows, start, first);
      }
      if (!opened) continue;
      call.touched[call.touched_place(lane, task.batch, task.group, query / call.tile_queries)] = 1;
      add_to_queries(blocks, call, task, rows, grad_q_part);
    }
    store_keys<Input>(call.grad_k, call.grad_k_strides, task, start, end, blocks.grad_k, blocks, call.scale);
    store_keys<Input>(call.grad_v, call.grad_v_strides, task, start, end, blocks.grad_v, blocks, 1.0f);
  }
}

}  // namespace
}  // namespace LONGLLAVA_FORM
}  // namespace longllava
