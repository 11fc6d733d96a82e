// A product of matrices in registers, for convolutions: rows of numbers times a panel of output channels.
#pragma once

#include "vector.h"

namespace longllava {

constexpr int64_t PANEL = 16;  // output channels worked on at a time

namespace LONGLLAVA_FORM {

constexpr int PANEL_VECTORS = PANEL / WIDTH;
constexpr int PANEL_ROWS = 3 * WIDTH / 4;  // rows multiplied at a time: 12 vectors of sums in registers

typedef vec PanelSums[PANEL_ROWS][PANEL_VECTORS];

// sums[r][k] += values[r * step + t] weight[t][k] over t < depth
LONGLLAVA_INLINE void add_products(PanelSums& sums, const float* values, int64_t step, int64_t depth,
                                   const float* weight) {
  for (int64_t t = 0; t < depth; ++t, weight += PANEL) {
    vec panel[PANEL_VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; ++v) panel[v] = load(weight + v * WIDTH);
#pragma GCC unroll 12
    for (int r = 0; r < PANEL_ROWS; ++r) {
      const vec value = splat(values[r * step + t]);
#pragma GCC unroll 4
      for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][v] += value * panel[v];
    }
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
