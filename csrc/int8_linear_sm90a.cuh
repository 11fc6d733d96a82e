// The product of int8 matrices on Hopper: y (M, N) = x_scale x (scale weight)^T + bias, sums exact in int32.
//
// A block stays on its processor and goes from tile to tile of y. One thread fetches the tiles' operands into a ring of
// stages of 128 inputs, running ahead into the next tile; two warpgroups multiply, 64 rows of the tile each. Two blocks
// of a cluster have tiles one above the other, and fetch half of the weights each, for both.
#pragma once

#include "int8_linear_write.cuh"

namespace longllava {

// How a product finds an operand in shared memory: rows of 128 bytes as the accelerator's 128-byte swizzle puts them,
// eight rows 1,024 bytes, which is also what x must be aligned to. 32 bytes further along the rows is 2 more.
__device__ __forceinline__ uint64_t operand(const void* x) {
  constexpr uint64_t swizzle = 1, eight_rows = 1024;
  return swizzle << 62 | (eight_rows >> 4) << 32 | uint64_t{1} << 16 | ((shared_address(x) & 0x3ffff) >> 4);
}

// The ring as one of those sees it who go through it stage by stage.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void fetch_tiles(const TensorMap* x, const TensorMap* weight, unsigned char* shared,
                                            uint64_t* full, uint64_t* empty, int n_down, int n_across, int n_stages,
                                            int group) {
  const int rank = cluster_rank();
  constexpr int PART = COLUMNS / CLUSTER;
  Ring ring;
  for (int i = blockIdx.x / CLUSTER; i < n_down * n_across; i += gridDim.x / CLUSTER) {
    const Tile tile(i, n_down, n_across, group);
    const int row = (tile.down * CLUSTER + rank) * ROWS, column = tile.across * COLUMNS + rank * PART;
    for (int k = 0; k < n_stages; ++k) {
      unsigned char* place = shared + ring.stage * STAGE_BYTES;
      wait(empty + ring.stage, ring.parity ^ 1);
      arrive_expecting(full + ring.stage, STAGE_BYTES);
      fetch(place, x, k * STAGE_INPUTS, row, full + ring.stage);
      place += X_BYTES + rank * PART * STAGE_INPUTS;
      fetch_for((1 << CLUSTER) - 1, place, weight, k * STAGE_INPUTS, column, full + ring.stage);
      ring.next();
    }
  }
}

// This warp has read the stage: every block that fetches into it is told.
__device__ __forceinline__ void release(uint64_t* empty) {
  const int lane = threadIdx.x % 32;
  if (lane < CLUSTER) arrive_at(empty, lane);
}

template <class T>
__device__ __forceinline__ void multiply_tiles(const TensorMap* y, const Int8ProductArguments& p,
                                               unsigned char* shared, uint64_t* full, uint64_t* empty, int n_down,
                                               int n_across, int n_stages) {
  constexpr int OWN = COLUMNS / WARPGROUP;  // scales that a thread brings
  constexpr int BEGUN = 3;                  // the barrier that the second warpgroup begins at
  const int warpgroup = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, lane = thread % 32;
  const int rank = cluster_rank();
  const int inside = warpgroup * 64 + thread / 32 * 16;  // of the tile, this warp's rows
  float* scales = reinterpret_cast<float*>(shared + SCALE_PLACE) + warpgroup * 2 * COLUMNS;
  unsigned char* buffers = shared + PUT_PLACE + (warpgroup * 4 + thread / 32) * PUTS * PUT_BYTES;
  int buffer = 0;
  // a stage apart, one of them multiplies while the other writes
  bool alone = p.staggered && warpgroup == 0;
  if (p.staggered && warpgroup == 1) meet_at<2 * WARPGROUP>(BEGUN);
  Ring ring;
  for (int i = blockIdx.x / CLUSTER; i < n_down * n_across; i += gridDim.x / CLUSTER) {
    const Tile tile(i, n_down, n_across, static_cast<int>(p.group));
    const int column = tile.across * COLUMNS;
    const int row = (tile.down * CLUSTER + rank) * ROWS + inside;
    float own_scale[OWN], own_bias[OWN], x_scale[2];
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
      const int at = column + n * WARPGROUP + thread;
      own_scale[n] = at < p.outputs ? p.scale[at] : 0.0f;
      own_bias[n] = at < p.outputs ? bias_at(p, at) : 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + half * 8 + lane / 4;
      x_scale[half] = at < p.rows ? p.x_scale[at] : 0.0f;
    }
    int sum[COLUMNS / 2];
    int before = 0;
    for (int k = 0; k < n_stages; ++k) {
      unsigned char* place = shared + ring.stage * STAGE_BYTES;
      wait(full + ring.stage, ring.parity);
      const uint64_t a = operand(place + warpgroup * 64 * STAGE_INPUTS), b = operand(place + X_BYTES);
      begin_products();
#pragma unroll
      for (int step = 0; step < STAGE_INPUTS / STEP_INPUTS; ++step)
        multiply(sum, a + step * STEP_INPUTS / 16, b + step * STEP_INPUTS / 16, k > 0 || step > 0);
      end_products();
      wait_products<1>();
      if (k > 0) release(empty + before);
      if (alone && k == 1) pass<2 * WARPGROUP>(BEGUN), alone = false;
      before = ring.stage;
      ring.next();
    }
    wait_products<0>();
    settle(sum);
    release(empty + before);
    if (alone) pass<2 * WARPGROUP>(BEGUN), alone = false;
    meet_at<WARPGROUP>(1 + warpgroup);
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
      scales[n * WARPGROUP + thread] = own_scale[n];
      scales[COLUMNS + n * WARPGROUP + thread] = own_bias[n];
    }
    meet_at<WARPGROUP>(1 + warpgroup);
    write<T>(sum, scales, x_scale, p, y, buffers, buffer, row, column);
  }
  if (lane == 0) wait_puts();
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    int8_product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                 const __grid_constant__ TensorMap y, const __grid_constant__ Int8ProductArguments p) {
  unsigned char* shared = aligned_shared();
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + BARRIER_PLACE);
  uint64_t* empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) make_barrier(full + i, 1), make_barrier(empty + i, RELEASES);
    show_barriers();
  }
  meet_cluster();
  constexpr int TALL = ROWS * CLUSTER;
  const int n_down = static_cast<int>((p.rows + TALL - 1) / TALL);
  const int n_across = static_cast<int>((p.outputs + COLUMNS - 1) / COLUMNS);
  const int n_stages = static_cast<int>((p.inputs + STAGE_INPUTS - 1) / STAGE_INPUTS);
  if (threadIdx.x < WARPGROUP) {
    fewer_registers<40>();
    if (threadIdx.x == 0)
      fetch_tiles(&x, &weight, shared, full, empty, n_down, n_across, n_stages, static_cast<int>(p.group));
  } else {
    more_registers<232>();
    multiply_tiles<T>(&y, p, shared, full, empty, n_down, n_across, n_stages);
  }
  meet_cluster();  // a block's memory must be there until the others no longer write to it
}

}  // namespace longllava
