// One attention call, as attention.cpp hands it to the kernels. Plain data.
//
// Letters in comments: q (B, L, H, K), k and v (B, S, G, K); H / G query heads read one group's keys.
// A "row" is one query of one head; the rows of a group's tile are ordered query first, head second.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace longllava {

constexpr int64_t KEY_BLOCK = 64;  // keys taken at a time, but where a call says otherwise

// Strides in elements; the last axis (head_dim) is contiguous.
struct AttentionStrides {
  int64_t batch, token, head;
};

// The seq_idx values >= 0 in one block of keys: `low` > `high` when there are none.
struct KeyRange {
  int32_t low, high;
  bool has_padding;
};

struct AttentionCall {
  const void *q, *k, *v;
  void* y;     // written by the forward pass, read by the backward pass; so is lse
  float* lse;  // (B, L, H) contiguous, or null in the forward pass
  AttentionStrides q_strides, k_strides, v_strides, y_strides;
  int64_t batch, n_queries, n_keys, n_heads, n_groups, head_dim;
  float scale;
  bool causal;
  const int32_t* seq_q;        // (B, L) contiguous, or null together with seq_k
  const int32_t* seq_k;        // (B, S)
  const KeyRange* key_ranges;  // (B, n_key_blocks), or null
  int64_t n_key_blocks, key_block;  // key j belongs to block j / key_block
  // The work is cut into batch x group x tile of queries x split of the keys. With one split a task writes y and
  // lse; with more it writes its rows' unnormalised sums to `partial`, (task, tile_queries * H / G, K + 2) fp32:
  // sum of p v, then the base-2 maximum, then the sum of p.
  int64_t heads_per_group, tile_queries, n_tiles, split_keys, n_splits;
  float* partial;

  int64_t n_tasks() const { return batch * n_groups * n_tiles * n_splits; }
  // Keys below this are visible to query i as far as order goes.
  int64_t end_of_keys(int64_t query) const { return causal ? n_keys - n_queries + query + 1 : n_keys; }
};

// Where one task stands in the call.
struct AttentionTask {
  int64_t batch, group, first_query, n_queries, n_rows, first_key, end_key;
};

inline AttentionTask forward_task(const AttentionCall& call, int64_t index) {
  AttentionTask task;
  const int64_t split = index % call.n_splits;
  // the last tiles of a causal call see the most keys: they start first, so that the threads end together
  const int64_t tile = call.n_tiles - 1 - index / call.n_splits % call.n_tiles;
  task.group = index / (call.n_splits * call.n_tiles) % call.n_groups;
  task.batch = index / (call.n_splits * call.n_tiles * call.n_groups);
  task.first_query = tile * call.tile_queries;
  const int64_t left = call.n_queries - task.first_query;
  task.n_queries = left < call.tile_queries ? left : call.tile_queries;
  task.n_rows = task.n_queries * call.heads_per_group;
  task.first_key = split * call.split_keys;
  const int64_t end = call.end_of_keys(task.first_query + task.n_queries - 1);
  task.end_key = end < task.first_key + call.split_keys ? end : task.first_key + call.split_keys;
  return task;
}

// The backward pass. Work is cut into batch x group x lane; a lane takes every n_lanes-th chunk of keys in turn
// and adds its part of q's gradient to its own (B, L, H, K) fp32 of `grad_q_parts`, unscaled; `touched` tells of
// every (lane, batch, group, tile of queries) whether it did.
struct AttentionBackwardCall : AttentionCall {
  const void* grad_y;
  const float* grad_lse;  // (B, L, H), or null
  void *grad_q, *grad_k, *grad_v;
  AttentionStrides grad_y_strides, grad_q_strides, grad_k_strides, grad_v_strides;
  float* grad_q_parts;
  uint8_t* touched;
  int64_t chunk_keys, n_chunks, n_lanes;

  int64_t touched_place(int64_t lane, int64_t in_batch, int64_t group, int64_t tile) const {
    return ((lane * batch + in_batch) * n_groups + group) * n_tiles + tile;
  }
};

}  // namespace longllava

// Each runs task `index` of the call. The first has the width of a tile, the second is for up to 8 rows (decode).
LONGLLAVA_DECLARE(void, attention_tile_float, (const AttentionCall& call, int64_t index))
LONGLLAVA_DECLARE(void, attention_tile_bf16, (const AttentionCall& call, int64_t index))
LONGLLAVA_DECLARE(void, attention_few_rows_float, (const AttentionCall& call, int64_t index))
LONGLLAVA_DECLARE(void, attention_few_rows_bf16, (const AttentionCall& call, int64_t index))

LONGLLAVA_DECLARE(void, attention_backward_float, (const AttentionBackwardCall& call, int64_t index))
LONGLLAVA_DECLARE(void, attention_backward_bf16, (const AttentionBackwardCall& call, int64_t index))
