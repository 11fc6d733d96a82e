// What the forward and the backward entry share before any kernel runs.
#pragma once

#include <limits>
#include <vector>

#include "attention.h"

namespace longllava {

// A call as it comes from Python (longllava/ops/attention/cpu.py packs the same fields). Addresses may be 0 where
// the fields below say so; strides are in elements, the last axis is contiguous.
struct AttentionRows {
  void* start;
  AttentionStrides strides;
};
struct AttentionArguments {
  int64_t size;  // of this struct, in bytes
  int64_t batch, n_queries, n_keys, n_heads, n_groups, head_dim;
  int64_t causal, bf16, n_threads;
  double scale;
  AttentionRows q, k, v, y;
  float* lse;                   // (B, L, H); 0: not wanted by the forward pass
  const int32_t *seq_q, *seq_k; // (B, L), (B, S), both or neither
  AttentionRows grad_y, grad_q, grad_k, grad_v;  // these and the next only for the backward pass
  const float* grad_lse;        // (B, L, H); 0: no gradient
};

inline void read_arguments(AttentionCall& call, const AttentionArguments& from) {
  call.batch = from.batch, call.n_queries = from.n_queries, call.n_keys = from.n_keys;
  call.n_heads = from.n_heads, call.n_groups = from.n_groups, call.head_dim = from.head_dim;
  call.heads_per_group = call.n_heads / call.n_groups;
  call.causal = from.causal != 0;
  call.scale = static_cast<float>(from.scale);
  call.q = from.q.start, call.q_strides = from.q.strides;
  call.k = from.k.start, call.k_strides = from.k.strides;
  call.v = from.v.start, call.v_strides = from.v.strides;
  call.y = from.y.start, call.y_strides = from.y.strides;
  call.key_block = KEY_BLOCK;
  call.lse = from.lse, call.seq_q = from.seq_q, call.seq_k = from.seq_k;
}

// The seq_idx found in each block of keys, so that blocks no row can see are passed over. Empty without seq_idx.
inline std::vector<KeyRange> key_ranges(AttentionCall& call) {
  call.n_key_blocks = (call.n_keys + call.key_block - 1) / call.key_block;
  std::vector<KeyRange> ranges;
  if (call.seq_k == nullptr) return ranges;
  ranges.assign(call.batch * call.n_key_blocks, {std::numeric_limits<int32_t>::max(), -1, false});
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t key = 0; key < call.n_keys; ++key) {
      KeyRange& range = ranges[b * call.n_key_blocks + key / call.key_block];
      const int32_t id = call.seq_k[b * call.n_keys + key];
      range.has_padding |= id < 0;
      if (id >= 0 && id < range.low) range.low = id;
      if (id > range.high) range.high = id;
    }
  }
  return ranges;
}

// fp32 to the type of the result; bf16 to nearest, ties to even.
inline void store_rounded(float* target, float value) { *target = value; }
inline void store_rounded(uint16_t* target, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *target = static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// One thread where the call is done in some 100 us: starting another would take a good part of that.
inline int useful_threads(const AttentionCall& call, int n_threads) {
  const double multiplications = 2.0 * call.batch * call.n_queries * call.n_keys * call.n_heads * call.head_dim;
  return multiplications < 3e6 ? 1 : n_threads;
}

}  // namespace longllava
