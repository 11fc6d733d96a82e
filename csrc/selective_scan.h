// The C interface of the selective scan, and what its entry file and its kernels share.
//
//   d = softplus(delta + bias);  h = exp(d A) h + d u B;  y = (C . h + D u) silu(z)
//
// longllava/ops/selective_scan/cpu.py fills ScanArguments field by field, in this order, 8 bytes each.
#pragma once

#include "isa.h"
#include "rows.h"

namespace longllava {

constexpr int SCAN_MAX_STATES = 256;
constexpr int SCAN_CHUNK = 16;           // tokens between two saved states, and at most of one step
// Channels that a task walks together. Rows lie pages apart, so the wider the tile, the fewer address translations
// (two cores with AVX-512: 256 channels take 1.02 to 1.04 times as long as 512, and 128 as long as that beside 256).
// Narrower tiles keep more threads busy.
constexpr int SCAN_MIN_TILE = 32, SCAN_MAX_TILE = 512;  // multiples of every WIDTH
constexpr int SCAN_TILE_STATES = 1 << 14;  // of all its channels at most: 128 KB with A, on a thread's stack
constexpr int SCAN_BACKWARD_TILE = 64;   // fixed: sums over channels are taken tile by tile
constexpr int SCAN_MAX_SLICES = 16;      // partial dB and dC per batch row; fixed, so that threads change no bit

struct ScanArguments {
  int64_t bytes;  // sizeof(ScanArguments), to catch a caller of another version
  int64_t batch, length, channels, states, softplus, threads;
  Rows u, delta, z, B, C, y;  // z.data may be null
  const float *A, *D, *bias;          // (E, N), (E), (E); D and bias may be null
  const float* state;                 // (B, E, N) or null
  const int32_t* seq_idx;             // (B, L) or null
  float* state_out;                   // (B, E, N); forward
  float* checkpoints;                 // scan_checkpoints(...) floats, or null; written by forward, read by backward
  // Backward only. Gradients may be null where nobody wants them, except those of u, delta, B and C.
  Rows grad_y, grad_u, grad_delta, grad_z, grad_B, grad_C;
  const float* grad_state_out;        // (B, E, N) or null
  float *grad_A, *grad_D, *grad_bias, *grad_state;
};

// What the tasks see besides the arguments; made by selective_scan.cpp.
struct ScanPlan {
  ScanArguments args;
  const uint8_t* flags;   // (B, L) TokenFlag, or null: all plain
  int64_t tile, n_tiles, n_slices;
  float *partial_B, *partial_C;           // (slices, B, L, N)
  float *partial_A, *partial_D, *partial_bias;  // (B, E, N), (B, E), (B, E)
};

constexpr int64_t SCAN_REDUCE_ROWS = 1024;  // tokens per task when partial dB and dC are summed

}  // namespace longllava

LONGLLAVA_DECLARE(void, scan_forward_task, (void* plan, int64_t task))
LONGLLAVA_DECLARE(void, scan_backward_task, (void* plan, int64_t task))
LONGLLAVA_DECLARE(void, scan_reduce_task, (void* plan, int64_t task))
