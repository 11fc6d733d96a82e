// What the two kinds of warps of the scan's backward kernel (selective_scan_backward.cuh) hand to each other.
#pragma once

#include "selective_scan_cuda.cuh"

namespace longllava {

constexpr int BACK_TOKENS = 4;                        // of a tile
constexpr int BACK_TILES = SCAN_CHUNK / BACK_TOKENS;  // of a chunk
// A tile is prepared at one interval, walked forward at the next, and walked backward when its whole chunk has been
// walked forward: the first tile of a chunk last. Its sums are finished one interval later.
constexpr int BACK_DELAY = BACK_TILES + 1;
constexpr int BACK_RING = 2 * BACK_TILES + 2;         // tiles alive at once
constexpr int BACK_OUTPUTS = 2 * SCAN_STATES;         // gradients of B and C of a token

template <int CHANNELS>
struct BackwardShared {
  static constexpr int WALKERS = CHANNELS * 2, LANES = CHANNELS / 2;  // threads of a kind; those with the same states
  static constexpr int PITCH = CHANNELS + 8;                // as in the forward kernel
  float2 steps[BACK_RING][BACK_TOKENS][CHANNELS];           // d, d u
  float inner[BACK_RING][BACK_TOKENS][CHANNELS];            // gradient of y before the gate
  float rows[BACK_RING][BACK_TOKENS][BACK_OUTPUTS];         // B, C
  float4 states[2 * BACK_TILES][2][WALKERS];                // before each tile
  int resets[BACK_RING][BACK_TOKENS];
  float sums[2][3][BACK_TOKENS][4][PITCH];                  // each lane's part of y, of the gradients of d u and of d
  float outputs[2][BACK_TOKENS][LANES][BACK_OUTPUTS];       // each lane's part of the gradients of B and C
};

// Tiles in the order in which they are prepared (chunks from the last, tokens forward), or walked backward.
struct BackTile {
  int token, slot, state_slot;  // first token from the span's first; places in the rings
  __device__ static BackTile at(int n_chunks, int chunk, int tile) {
    const int place = chunk * BACK_TILES + tile;
    return {((n_chunks - 1 - chunk) * BACK_TILES + tile) * BACK_TOKENS, place % BACK_RING, place % (2 * BACK_TILES)};
  }
  __device__ static BackTile prepared(int n_chunks, int i) { return at(n_chunks, i / BACK_TILES, i % BACK_TILES); }
  __device__ static BackTile walked(int n_chunks, int i) {
    return at(n_chunks, i / BACK_TILES, BACK_TILES - 1 - i % BACK_TILES);
  }
};

// Which four states, and which two channels of the block, a thread holds; as in the forward kernel.
struct BackLane {
  int group, lane, channel;
  __device__ explicit BackLane(int id) {
    const int low = id % 32;
    group = (low & 1) | (low >> 1 & 2);
    lane = id / 32 * 8 + ((low >> 1 & 1) | (low >> 2 & 2) | (low >> 2 & 4));
    channel = lane * 2;
  }
};

}  // namespace longllava
