// What the forward and the backward entry share before any kernel runs.
#pragma once

#include <limits>
#include <vector>

#include "attention.h"

namespace longllava {

// B, L, S, H, G, K, then the strides (batch, token, head) of q, k, v and y.
inline void read_numbers(AttentionCall& call, const int64_t* numbers) {
  call.batch = numbers[0], call.n_queries = numbers[1], call.n_keys = numbers[2];
  call.n_heads = numbers[3], call.n_groups = numbers[4], call.head_dim = numbers[5];
  AttentionStrides* strides[] = {&call.q_strides, &call.k_strides, &call.v_strides, &call.y_strides};
  for (int i = 0; i < 4; ++i) *strides[i] = {numbers[6 + 3 * i], numbers[7 + 3 * i], numbers[8 + 3 * i]};
}

// The seq_idx found in each block of keys, so that blocks no row can see are passed over. Empty without seq_idx.
inline std::vector<KeyRange> key_ranges(AttentionCall& call) {
  call.n_key_blocks = (call.n_keys + KEY_BLOCK - 1) / KEY_BLOCK;
  std::vector<KeyRange> ranges;
  if (call.seq_k == nullptr) return ranges;
  ranges.assign(call.batch * call.n_key_blocks, {std::numeric_limits<int32_t>::max(), -1, false});
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t key = 0; key < call.n_keys; ++key) {
      KeyRange& range = ranges[b * call.n_key_blocks + key / KEY_BLOCK];
      const int32_t id = call.seq_k[b * call.n_keys + key];
      range.has_padding |= id < 0;
      if (id >= 0 && id < range.low) range.low = id;
      if (id > range.high) range.high = id;
    }
  }
  return ranges;
}

// One thread where the call is done in some 100 us: starting another would take a good part of that.
inline int useful_threads(const AttentionCall& call, int n_threads) {
  const double multiplications = 2.0 * call.batch * call.n_queries * call.n_keys * call.n_heads * call.head_dim;
  return multiplications < 3e6 ? 1 : n_threads;
}

}  // namespace longllava
