// The shared memory that the scan's forward kernel works in, and how its threads share the work
// (selective_scan_forward.cuh).
#pragma once

#include "selective_scan_cuda.cuh"

namespace longllava {

constexpr int SCAN_HELPERS = 128;  // threads that prepare tiles, and as many that finish them
constexpr int SCAN_AHEAD = 3;  // tiles in work, following, and being prepared
constexpr int SCAN_GROUP = 4;  // tokens of a channel that lie side by side in shared memory: 16 bytes

// Rows of 16 bytes: a channel's steps of four tokens. A helper thread has two channels side by side, 2 i and 2 i + 1,
// which are rows i and 32 + i: so the 32 lanes of a warp write 32 rows that follow each other.
constexpr int SCAN_HALF = SCAN_CHANNELS / 2;
__device__ __forceinline__ int channel_of_row(int row) { return row % SCAN_HALF * 2 + row / SCAN_HALF; }

template <class T, int TOKENS, int DEPTH>
struct ForwardShared {
  // tiles alive: one being finished, one in work, one that follows it, one being prepared, DEPTH on their way
  static constexpr int RING = DEPTH + 4, GROUPS = TOKENS / SCAN_GROUP;
  static constexpr int FIRST_TILES = DEPTH + 2;  // asked for at once, when no other is alive yet
  static_assert(TOKENS % 16 == 0, "a warp of helpers has every fourth group, and sixteen rows of B and C");
  float d[SCAN_AHEAD * GROUPS][SCAN_CHANNELS][SCAN_GROUP];  // steps
  float x[SCAN_AHEAD * GROUPS][SCAN_CHANNELS][SCAN_GROUP];  // d u
  float rows[SCAN_AHEAD][TOKENS][2 * SCAN_STATES];          // B, C
  // each lane's part of C . h; two rows more, so that the four lanes of a channel write to different banks
  float partial[2][GROUPS][4][SCAN_CHANNELS + 2][SCAN_GROUP];
  T raw[RING][3][TOKENS][SCAN_CHANNELS];  // u, delta, z
};

// With int8 rows a tile of y is kept until all blocks have added to its tokens' maxima: they may be as far apart as
// SCAN_LAG - 1 tiles before one waits for another.
constexpr int SCAN_LAG = 3;
template <class T, int TOKENS, int DEPTH>
constexpr int64_t INT8_BYTES =
    sizeof(ForwardShared<T, TOKENS, DEPTH>) + (SCAN_LAG + 1) * TOKENS * SCAN_CHANNELS * sizeof(T);

constexpr int SCAN_THREADS = SCAN_CHANNELS * 4 + 2 * SCAN_HELPERS;  // main ones, preparing and finishing ones

}  // namespace longllava
