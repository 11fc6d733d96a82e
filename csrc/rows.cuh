// What the ops' CUDA kernels share: tensors read by rows, and what seq_idx says of a token.
#pragma once

#include <device.cuh>

namespace longllava {

// A (batch, tokens, columns) tensor whose last axis has stride 1; strides in elements.
struct Rows {
  void* data;
  int64_t batch_stride, step;
};

enum Flag : int8_t { FLAG_PLAIN = 0, FLAG_PADDING = 1, FLAG_RESET = 2 };

}  // namespace longllava
