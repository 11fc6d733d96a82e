// The C interface of the int8 product on Hopper, and where its tiles lie in memory and in shared memory.
#pragma once

#include <hopper.cuh>

namespace longllava {

// longllava/ops/int8_linear/cuda.py fills this field by field, in this order, 8 bytes each.
struct Int8ProductArguments {
  int64_t bytes;  // sizeof(Int8ProductArguments), to catch a caller of another version
  int64_t dtype;  // of y: 1 bf16, 2 fp16
  int64_t bias_dtype;
  int64_t rows, outputs, inputs;  // M, N, K
  int64_t group;                  // tiles of rows that go together along the outputs
  int64_t staggered;              // 1: the second warpgroup begins a stage after the first
  int64_t processors;
  void* stream;
  const int8_t *x, *weight;  // (M, K), (N, K), both at addresses that 16 divides, as it does K
  const float *x_scale, *scale;
  const void* bias;  // (N) or null
  void* y;           // (M, N), 8 divides N
};

constexpr int ROWS = 128, COLUMNS = 256;  // of a block's tile; a cluster's are one above the other
constexpr int CLUSTER = 2, STAGES = 4;
constexpr int STAGE_INPUTS = 128;  // a row of a stage, in the 128 bytes that the swizzle mixes
constexpr int STEP_INPUTS = 32;    // of one instruction
constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;
// What a warp writes at once: 64 bytes of each of its rows, from one of its three buffers.
constexpr int PUT_COLUMNS = 32, PUT_ROWS = 16, PUTS = 3;
constexpr int PUT_BYTES = PUT_ROWS * PUT_COLUMNS * 2;

constexpr int X_BYTES = ROWS * STAGE_INPUTS, WEIGHT_BYTES = COLUMNS * STAGE_INPUTS;
constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
constexpr int PUT_PLACE = STAGES * STAGE_BYTES;
constexpr int SCALE_PLACE = PUT_PLACE + 8 * PUTS * PUT_BYTES;
constexpr int BARRIER_PLACE = SCALE_PLACE + 2 * 2 * COLUMNS * 4;
constexpr int SHARED_BYTES = BARRIER_PLACE + 2 * STAGES * 8;
constexpr int RELEASES = 8 * CLUSTER;  // warps that read a stage, of both blocks
static_assert(SHARED_BYTES <= 227 * 1024);

// Where a tile lies. Groups of tiles of rows share what they read of the weights in the second-level cache; within one,
// rows go first.
struct Tile {
  int down, across;
  __host__ __device__ Tile(int tile, int n_down, int n_across, int group) {
    const int in_group = group * n_across, first = tile / in_group * group, rest = tile % in_group;
    const int height = n_down - first < group ? n_down - first : group;
    down = first + rest % height;
    across = rest / height;
  }
};

}  // namespace longllava
