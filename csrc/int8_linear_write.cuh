// The end of a tile of the int8 product: scales, bias, and the way from a warpgroup's sums to y.
#pragma once

#include "int8_linear_cuda.cuh"

namespace longllava {

// Without a bias -0, which adds nothing to any number, a zero's sign included.
__device__ __forceinline__ float bias_at(const Int8ProductArguments& p, int column) {
  if (p.bias == nullptr) return -0.0f;
  if (p.bias_dtype == 1) return to_float(static_cast<const bf16*>(p.bias)[column]);
  if (p.bias_dtype == 2) return to_float(static_cast<const fp16*>(p.bias)[column]);
  return static_cast<const float*>(p.bias)[column];
}

// In this order, the last two in one instruction, as Triton's kernel does it.
__device__ __forceinline__ float scaled(int sum, float scale, float x_scale, float bias) {
  return fmaf(static_cast<float>(sum) * scale, x_scale, bias);
}

// Through shared memory, where a warp's 16 rows of 64 bytes lie as the accelerator's 64-byte swizzle has them.
template <class T>
__device__ __forceinline__ void write(const int (&sum)[COLUMNS / 2], const float* scales, const float (&x_scale)[2],
                                      const Int8ProductArguments& p, const TensorMap* y, unsigned char* buffers,
                                      int& buffer, int row, int column) {
  const int lane = threadIdx.x % 32, lane_row = lane % 16;
#pragma unroll
  for (int c = 0; c < COLUMNS / PUT_COLUMNS; ++c) {
    uint32_t bits[8];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int j = 4 * c + b, at = 8 * j + lane % 4 * 2;
      const float2 scale = *reinterpret_cast<const float2*>(scales + at);
      const float2 bias = *reinterpret_cast<const float2*>(scales + COLUMNS + at);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        bits[2 * b + half] = bits_from(scaled(sum[4 * j + 2 * half], scale.x, x_scale[half], bias.x),
                                       scaled(sum[4 * j + 2 * half + 1], scale.y, x_scale[half], bias.y), T{}).bits;
    }
    unsigned char* place = buffers + buffer * PUT_BYTES;
    if (lane == 0) wait_read_puts<PUTS - 1>();
    __syncwarp();
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int unit = (2 * pair + lane / 16) ^ (lane_row / 2 % 4);
      store_matrices(place + lane_row * PUT_COLUMNS * 2 + unit * 16, bits[4 * pair], bits[4 * pair + 1],
                     bits[4 * pair + 2], bits[4 * pair + 3]);
    }
    show_to_accelerator();
    __syncwarp();
    if (lane == 0) {
      if (row < p.rows && column + c * PUT_COLUMNS < p.outputs) put(y, column + c * PUT_COLUMNS, row, place);
      end_puts();  // a group without puts counts, too
    }
    buffer = buffer + 1 == PUTS ? 0 : buffer + 1;
  }
}

}  // namespace longllava
