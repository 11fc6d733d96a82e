// The C interface of the convolution of pixels, and what its entry file and its kernels share.
//
//   y = ((x - mean) / std) * weight + bias, below 0 cut off if relu; padded by zeros, which are pixels of the mean
//
// longllava/ops/pixel_conv/cpu.py fills PixelConvArguments field by field, in this order, 8 bytes each.
#pragma once

#include "isa.h"
#include "panel.h"

namespace longllava {

struct PixelConvArguments {
  int64_t bytes;                       // sizeof(PixelConvArguments)
  int64_t batch, channels, height, width, outputs;
  int64_t kernel, stride, padding;     // the same both ways
  int64_t threads;
  const uint8_t* x;                    // (batch, channels, height, width) without gaps
  const float *mean, *std;             // (channels)
  const float *weight, *bias;          // (outputs, channels, kernel, kernel) without gaps; (outputs)
  float* y;                            // (batch, rows, columns, outputs)
  int64_t relu;
};

struct PixelConvPlan {
  PixelConvArguments args;
  int64_t rows, columns;    // of outputs
  float* weight;            // (outputs / PANEL, channels, kernel, kernel, PANEL)
  char* slots;              // a worker's own memory: the rows of pixels that a row of outputs sees, as floats
  int64_t slot_bytes;
  int64_t next_row;         // a counter that workers share, of all pictures' rows of outputs

  int64_t depth() const { return args.channels * args.kernel * args.kernel; }
  // Floats of a row of pixels: with its padding, and zeros for the outputs that fill up the last PANEL_ROWS, which is
  // 3, 6 or 12.
  int64_t pitch() const { return (columns + 11) / 12 * 12 * args.stride + args.kernel; }
};

}  // namespace longllava

LONGLLAVA_DECLARE(void, pixel_conv_weight_task, (void* plan, int64_t panel))
LONGLLAVA_DECLARE(void, pixel_conv_worker, (void* plan, int64_t slot))
