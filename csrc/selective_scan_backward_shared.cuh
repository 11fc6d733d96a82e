// What the two kinds of warps of the scan's backward kernel (selective_scan_backward.cuh) hand to each other.
#pragma once

#include <type_traits>

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

// Tokens of a span of one tensor, at one column. Their distance in bytes fits 32 bits: an address is one product.
template <class T>
struct Tokens {
  T* first;
  int bytes;
  __device__ Tokens(T* first, int64_t step) : first(first), bytes(int(step * sizeof(T))) {}
  __device__ T* at(int token) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + int64_t(token) * bytes);
  }
};

// A tile of a span: its first token from the span's first, its number in its chunk, its places in the rings. The next
// one is found by steps: products and remainders would be computed by every thread of a warp.
struct BackTile {
  int token, number, slot, state_slot;

  // In the order of preparing: chunks from the last, tokens forward.
  __device__ static BackTile first_prepared(int n_chunks) { return {(n_chunks - 1) * SCAN_CHUNK, 0, 0, 0}; }
  __device__ void next_prepared() {
    token += BACK_TOKENS;
    slot = slot + 1 == BACK_RING ? 0 : slot + 1;
    state_slot = (state_slot + 1) % (2 * BACK_TILES);
    if (++number == BACK_TILES) number = 0, token -= 2 * SCAN_CHUNK;
  }

  // In the order of walking backward.
  __device__ static BackTile first_walked(int n_chunks) {
    return {n_chunks * SCAN_CHUNK - BACK_TOKENS, BACK_TILES - 1, BACK_TILES - 1, BACK_TILES - 1};
  }
  __device__ void next_walked() {
    token -= BACK_TOKENS, slot -= 1, state_slot -= 1;
    if (--number < 0) number = BACK_TILES - 1, slot += 2 * BACK_TILES, state_slot += 2 * BACK_TILES;
    if (slot < 0) slot += BACK_RING;
    if (slot >= BACK_RING) slot -= BACK_RING;
    state_slot %= 2 * BACK_TILES;
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
