// The product of int8 matrices on Hopper: y (M, N) = x_scale x (scale weight)^T + bias, sums exact in int32.
//
// A block stays on its processor and goes from tile to tile of y. One thread fetches the tiles' operands into a ring of
// stages of 128 inputs, running ahead into the next tile; two warpgroups multiply. They share a tile, 64 rows each, or
// alternate ("pingpong"), each with a tile of its own, so that one multiplies while the other writes. Two blocks of a
// cluster have tiles one above the other, and fetch half of the weights each, for both.
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
template <int STAGES> struct Ring {
  int stage;
  uint32_t parity;
  __device__ explicit Ring(uint32_t n_before) : stage(n_before % STAGES), parity(n_before / STAGES & 1) {}
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <class S>
__device__ __forceinline__ void fetch_tiles(const TensorMap* x, const TensorMap* weight, unsigned char* shared,
                                            uint64_t* full, uint64_t* empty, int n_down, int n_across, int n_stages,
                                            int group) {
  const int rank = S::CLUSTER > 1 ? cluster_rank() : 0;
  constexpr int PART = S::COLUMNS / S::CLUSTER;
  Ring<S::STAGES> ring(0);
  for (int i = blockIdx.x / S::CLUSTER; i < n_down * n_across; i += gridDim.x / S::CLUSTER) {
    const Tile tile(i, n_down, n_across, group);
    const int row = (tile.down * S::CLUSTER + rank) * S::ROWS, column = tile.across * S::COLUMNS + rank * PART;
    for (int k = 0; k < n_stages; ++k) {
      unsigned char* place = shared + ring.stage * S::STAGE_BYTES;
      wait(empty + ring.stage, ring.parity ^ 1);
      arrive_expecting(full + ring.stage, S::STAGE_BYTES);
      fetch(place, x, k * STAGE_INPUTS, row, full + ring.stage);
      place += S::X_BYTES + rank * PART * STAGE_INPUTS;
      if constexpr (S::CLUSTER > 1)
        fetch_for((1 << S::CLUSTER) - 1, place, weight, k * STAGE_INPUTS, column, full + ring.stage);
      else
        fetch(place, weight, k * STAGE_INPUTS, column, full + ring.stage);
      ring.next();
    }
  }
}

// This warp has read the stage: every block that fetches into it is told.
template <class S> __device__ __forceinline__ void release(uint64_t* empty) {
  const int lane = threadIdx.x % 32;
  if (lane < S::CLUSTER) arrive_at(empty, lane);
}

template <class T, class S, bool BY_PUTS>
__device__ __forceinline__ void multiply_tiles(const TensorMap* y, const Int8ProductArguments& p,
                                               unsigned char* shared, uint64_t* full, uint64_t* empty, int n_down,
                                               int n_across, int n_stages) {
  constexpr int OWN = S::COLUMNS / WARPGROUP;  // scales that a thread brings
  const int group = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP, lane = thread % 32;
  const int rank = S::CLUSTER > 1 ? cluster_rank() : 0;
  const int inside = (S::PINGPONG ? 0 : group * 64 * S::BLOCKS) + thread / 32 * 16;  // of the tile, this warp's rows
  float* scales = reinterpret_cast<float*>(shared + S::SCALE_PLACE) + group * 2 * S::COLUMNS;
  unsigned char* buffers = shared + S::PUT_PLACE + (group * 4 + thread / 32) * S::PUTS * PUT_BYTES;
  int buffer = 0;
  bool alone = S::STAGGER && group == 0;
  if (S::STAGGER && group == 1) meet_at<2 * WARPGROUP>(3);
  Ring<S::STAGES> ring(0);
  uint32_t n_tiles = 0;
  for (int i = blockIdx.x / S::CLUSTER; i < n_down * n_across; i += gridDim.x / S::CLUSTER, ++n_tiles) {
    if (S::PINGPONG) {
      if (n_tiles % 2 != group) continue;
      ring = Ring<S::STAGES>(n_tiles * n_stages);
    }
    const Tile tile(i, n_down, n_across, static_cast<int>(p.group));
    const int column = tile.across * S::COLUMNS;
    const int row = (tile.down * S::CLUSTER + rank) * S::ROWS + inside;
    float own_scale[OWN], own_bias[OWN], x_scale[S::BLOCKS][2];
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
      const int at = column + n * WARPGROUP + thread;
      own_scale[n] = at < p.outputs ? p.scale[at] : 0.0f;
      own_bias[n] = at < p.outputs ? bias_at(p, at) : 0.0f;
    }
#pragma unroll
    for (int m = 0; m < 2 * S::BLOCKS; ++m) {
      const int64_t at = row + m / 2 * 64 + m % 2 * 8 + lane / 4;
      x_scale[m / 2][m % 2] = at < p.rows ? p.x_scale[at] : 0.0f;
    }
    // the other's turn is over: a phase of the ring further than the next one could not be told from it
    if (S::PINGPONG && n_tiles > 0) meet_at<2 * WARPGROUP>(3 + group);
    int sum[S::BLOCKS][S::COLUMNS / 2];
    int before = 0;
    for (int k = 0; k < n_stages; ++k) {
      unsigned char* place = shared + ring.stage * S::STAGE_BYTES;
      wait(full + ring.stage, ring.parity);
      const uint64_t a = operand(place + (S::PINGPONG ? 0 : group * 64 * S::BLOCKS * STAGE_INPUTS));
      const uint64_t b = operand(place + S::X_BYTES);
      begin_products();
#pragma unroll
      for (int step = 0; step < STAGE_INPUTS / STEP_INPUTS; ++step)
#pragma unroll
        for (int m = 0; m < S::BLOCKS; ++m)
          multiply(sum[m], a + (m * 64 * STAGE_INPUTS + step * STEP_INPUTS) / 16, b + step * STEP_INPUTS / 16,
                   k > 0 || step > 0);
      end_products();
      wait_products<1>();
      if (k > 0) release<S>(empty + before);
      if (S::STAGGER && alone && k == 1) pass<2 * WARPGROUP>(3), alone = false;
      before = ring.stage;
      ring.next();
    }
    if (S::PINGPONG && i + gridDim.x / S::CLUSTER < n_down * n_across) pass<2 * WARPGROUP>(4 - group);
    wait_products<0>();
#pragma unroll
    for (int m = 0; m < S::BLOCKS; ++m) settle(sum[m]);
    release<S>(empty + before);
    if (S::STAGGER && alone) pass<2 * WARPGROUP>(3), alone = false;
    meet_at<WARPGROUP>(1 + group);
#pragma unroll
    for (int n = 0; n < OWN; ++n) {
      scales[n * WARPGROUP + thread] = own_scale[n];
      scales[S::COLUMNS + n * WARPGROUP + thread] = own_bias[n];
    }
    meet_at<WARPGROUP>(1 + group);
#pragma unroll
    for (int m = 0; m < S::BLOCKS; ++m) {
      if constexpr (BY_PUTS)
        write_by_puts<T, S>(sum[m], scales, x_scale[m], p, y, buffers, buffer, row + 64 * m, column);
      else
        write_directly<T, S>(sum[m], scales, x_scale[m], p, row + 64 * m, column);
    }
  }
  if (BY_PUTS && lane == 0) wait_puts();
}

template <class T, class S, bool BY_PUTS>
__global__ void __launch_bounds__(THREADS, 1)
    int8_product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                 const __grid_constant__ TensorMap y, const __grid_constant__ Int8ProductArguments p) {
  unsigned char* shared = aligned_shared();
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + S::BARRIER_PLACE);
  uint64_t* empty = full + S::STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::STAGES; ++i) make_barrier(full + i, 1), make_barrier(empty + i, S::RELEASES);
    show_barriers();
  }
  if constexpr (S::CLUSTER > 1)
    meet_cluster();
  else
    __syncthreads();
  constexpr int TALL = S::ROWS * S::CLUSTER;
  const int n_down = static_cast<int>((p.rows + TALL - 1) / TALL);
  const int n_across = static_cast<int>((p.outputs + S::COLUMNS - 1) / S::COLUMNS);
  const int n_stages = static_cast<int>((p.inputs + STAGE_INPUTS - 1) / STAGE_INPUTS);
  if (threadIdx.x < WARPGROUP) {
    fewer_registers<40>();
    if (threadIdx.x == 0)
      fetch_tiles<S>(&x, &weight, shared, full, empty, n_down, n_across, n_stages, static_cast<int>(p.group));
  } else {
    more_registers<232>();
    multiply_tiles<T, S, BY_PUTS>(&y, p, shared, full, empty, n_down, n_across, n_stages);
  }
  // a block's memory must be there until the others no longer write to it
  if constexpr (S::CLUSTER > 1) meet_cluster();
}

}  // namespace longllava
