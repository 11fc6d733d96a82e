// The C interface of the elementwise work between linear layers, and what its entry file and its kernels share.
//
//   norm:    total = other + x;  y = weight * total / sqrt(mean(total^2) + eps)
//   swiglu:  y = silu(x) * other
//
// longllava/ops/fused/cpu.py fills FusedArguments field by field, in this order, 8 bytes each.
#pragma once

#include "isa.h"
#include "vector.h"

namespace longllava {

constexpr int64_t FUSED_MAX_WIDTH = 32768;  // of a row, which a task keeps as fp32: 128 KB of its stack
constexpr int64_t FUSED_ROWS = 16;          // of a task

struct FusedArguments {
  int64_t bytes;                    // sizeof(FusedArguments)
  int64_t rows, width, threads;
  int64_t dtype;                    // DTYPE_FLOAT32 or DTYPE_BFLOAT16: of all that is not said to be another
  const void *x, *other;            // x_row and other_row elements from row to row; norm: other may be null
  int64_t x_row, other_row;
  const void* weight;               // (width); norm alone
  double eps;
  const float* absmax;              // (rows), the largest magnitudes of y where known, or null; with values
  void *y, *total;                  // (rows, width) without gaps; y or values, the other is null; total beside other
  int8_t* values;                   // (rows, width), the int8 rows of y, and their scales (rows)
  float* scale;
  int64_t rotated;                  // values are of rotated rows; not with absmax
};

}  // namespace longllava

LONGLLAVA_DECLARE(void, fused_norm_task, (void* args, int64_t task))
LONGLLAVA_DECLARE(void, fused_swiglu_task, (void* args, int64_t task))
