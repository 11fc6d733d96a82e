// The C interface of the 3 x 3 convolution, and what its entry file and its kernels share.
//
//   y = x * weight + bias (+ residual), below 0 cut off if relu; every side padded by one pixel of zeros, stride 1
//
// longllava/ops/conv3x3/cpu.py fills Conv3x3Arguments field by field, in this order, 8 bytes each.
#pragma once

#include "isa.h"
#include "panel.h"

namespace longllava {

constexpr int64_t CONV3X3_SIDE = 4;      // a tile of outputs, 4 x 4 pixels,
constexpr int64_t CONV3X3_SEEN = 6;      // comes from 6 x 6 inputs
constexpr int64_t CONV3X3_POINTS = 36;   // products of a tile for each pair of channels; 144 without the transforms
constexpr int64_t CONV3X3_TILES = 12;    // tiles of a group: a multiple of this, which is whole rows of every form

struct Conv3x3Arguments {
  int64_t bytes;                             // sizeof(Conv3x3Arguments)
  int64_t batch, height, width, inputs, outputs, threads;
  const float* x;                            // (batch, height, width, inputs) without gaps
  const float* weight;                       // (outputs, inputs, 3, 3) without gaps
  const float *bias, *residual;              // (outputs); of y's shape, or null
  float* y;                                  // (batch, height, width, outputs); not x
  int64_t relu;
};

struct Conv3x3Plan {
  Conv3x3Arguments args;
  int64_t tiles_down, tiles_across, n_tiles;  // n_tiles: of all pictures
  int64_t group;                              // tiles that a worker transforms at a time
  float* weight;                              // (outputs / PANEL, POINTS, weight_pitch), transformed: [inputs][PANEL]
  char* slots;                                // a worker's own memory, slot_bytes each
  int64_t slot_bytes;
  int64_t next_group;                         // a counter that workers share

  // Floats from one point to the next of a group's transformed inputs, of its products, and of a panel's weights: an
  // odd number of cache lines, or the 36 that are written in turn would share few sets of the first-level cache.
  int64_t inputs_pitch() const { return group * args.inputs + 16; }
  int64_t products_pitch() const { return group * PANEL + 16; }
  int64_t weight_pitch() const { return (args.inputs + 1) * PANEL; }
  int64_t slot_floats() const { return CONV3X3_POINTS * (inputs_pitch() + products_pitch()) + CONV3X3_SEEN * args.inputs + group * 16; }
};

}  // namespace longllava

LONGLLAVA_DECLARE(void, conv3x3_weight_task, (void* plan, int64_t panel))
LONGLLAVA_DECLARE(void, conv3x3_worker, (void* plan, int64_t slot))
