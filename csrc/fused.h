// The C interface of the elementwise work between linear layers, and what its entry file and its kernels share.
//
//   norm:    total = other + x;  y = weight * total / sqrt(mean(total^2) + eps)
//   swiglu:  y = silu(x) * other
//
// longllava/ops/fused/cpu.py fills FusedArguments and FusedGradients field by field, in this order, 8 bytes each.
#pragma once

#include "isa.h"
#include "vector.h"

namespace longllava {

constexpr int64_t FUSED_MAX_WIDTH = 32768;  // of a row, which a task keeps as fp32: 128 KB of its stack
constexpr int64_t FUSED_ROWS = 16;          // of a task
constexpr int64_t FUSED_SLICES = 16;        // of all rows, each with its own sums; fixed, so that threads change no bit

struct FusedArguments {
  int64_t bytes;                    // sizeof(FusedArguments)
  int64_t rows, width, threads;
  int64_t dtype, weight_dtype, y_dtype;  // each fp32 or bf16; dtype: of x, other and total
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

// Gradients of the above, without `total`, absmax and values.
struct FusedGradients {
  int64_t bytes;                    // sizeof(FusedGradients)
  int64_t rows, width, threads;
  int64_t dtype, weight_dtype, y_dtype;  // as above; dtype also of grad_x and grad_other, y_dtype of grad
  const void *x, *other, *grad;     // as above; grad: of y
  int64_t x_row, other_row, grad_row;
  const void* weight;               // (width); norm alone
  double eps;
  void *grad_x, *grad_other;        // (rows, width) without gaps; grad_other: swiglu alone
  float* grad_weight;               // (width); norm alone
};

struct FusedGradientsPlan {
  FusedGradients args;
  int64_t pitch;                    // floats from one row of sums to the next: width, rounded up to whole vectors
  float* sums;                      // (FUSED_SLICES, 2, pitch), 0 at first: of the present run (vector.h), of all
};

}  // namespace longllava

LONGLLAVA_DECLARE(void, fused_norm_back_task, (void* plan, int64_t slice))
LONGLLAVA_DECLARE(void, fused_swiglu_back_task, (void* args, int64_t task))
LONGLLAVA_DECLARE(void, fused_norm_task, (void* args, int64_t task))
LONGLLAVA_DECLARE(void, fused_swiglu_task, (void* args, int64_t task))
