// The C interface of the causal convolution, and what its entry file and its kernels share.
//
//   y_t = act(bias + sum_k weight_k x_(t - K + 1 + k)), over the real tokens of one sequence
//
// longllava/ops/causal_conv1d/cpu.py fills ConvArguments field by field, in this order, 8 bytes each.
#pragma once

#include "isa.h"
#include "rows.h"

namespace longllava {

constexpr int CONV_MAX_KERNEL = 8;
constexpr int CONV_CHUNK = 32;                          // tokens read, worked on and written together
constexpr int CONV_MIN_TILE = 32, CONV_MAX_TILE = 128;  // channels per task, as in selective_scan.h

struct ConvArguments {
  int64_t bytes;  // sizeof(ConvArguments)
  int64_t batch, length, channels, kernel, silu, threads;
  Rows x, state, y, state_out;  // state (B, K-1, E); its data may be null
  const float *weight, *bias;   // (E, K), (E); bias may be null
  const int32_t* seq_idx;       // (B, L) or null
  // Backward only; grad_state_out.data, grad_state.data and grad_bias may be null.
  Rows grad_y, grad_state_out, grad_x, grad_state;
  float *grad_weight, *grad_bias;
};

struct ConvPlan {
  ConvArguments args;
  const uint8_t* flags;  // (B, L) TokenFlag, or null: all plain
  int64_t tile, n_tiles;
  float *partial_weight, *partial_bias;  // (B, E, K), (B, E)
};

}  // namespace longllava

LONGLLAVA_DECLARE(void, conv_forward_task, (void* plan, int64_t task))
LONGLLAVA_DECLARE(void, conv_backward_task, (void* plan, int64_t task))
