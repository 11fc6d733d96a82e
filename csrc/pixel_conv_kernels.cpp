// A convolution of pixels for one instruction set (isa.h): each row of outputs from the rows of pixels that it sees,
// made floats in the first-level cache. Nothing but the bytes is read and nothing but the outputs written.
#include "pixel_conv.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

typedef uint8_t bytes_of_vec __attribute__((vector_size(WIDTH)));

// target[i] = (source[i] - mean) * scale for i < n
LONGLLAVA_INLINE void normalise(float* target, const uint8_t* source, int64_t n, float mean, float scale) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    bytes_of_vec pixels;
    __builtin_memcpy(&pixels, source + i, sizeof pixels);
    store(target + i, (__builtin_convertvector(__builtin_convertvector(pixels, ivec), vec) - mean) * scale);
  }
  for (; i < n; ++i) target[i] = (static_cast<float>(source[i]) - mean) * scale;
}

// The rows of pixels, [channel][kernel row][pitch], that row `row` of a picture's outputs sees.
void stage_rows(const PixelConvPlan& plan, const uint8_t* picture, int64_t row, float* rows) {
  const PixelConvArguments& a = plan.args;
  const int64_t pitch = plan.pitch();
  for (int64_t c = 0; c < a.channels; ++c) {
    const float scale = 1 / a.std[c];
    for (int64_t i = 0; i < a.kernel; ++i, rows += pitch) {
      const int64_t y = row * a.stride - a.padding + i;
      if (y < 0 || y >= a.height) {
        for (int64_t j = 0; j < pitch; ++j) rows[j] = 0;
      } else {
        const int64_t room = pitch - a.padding, n = a.width < room ? a.width : room;
        for (int64_t j = 0; j < a.padding; ++j) rows[j] = 0;
        normalise(rows + a.padding, picture + (c * a.height + y) * a.width, n, a.mean[c], scale);
        for (int64_t j = a.padding + n; j < pitch; ++j) rows[j] = 0;
      }
    }
  }
}

}  // namespace

// The weights of one panel of output channels, one channel to a lane.
void pixel_conv_weight_task(void* opaque, int64_t panel) {
  const PixelConvPlan& plan = *static_cast<const PixelConvPlan*>(opaque);
  const int64_t depth = plan.depth();
  float* to = plan.weight + panel * depth * PANEL;
  for (int64_t lane = 0; lane < PANEL; ++lane) {
    const float* from = plan.args.weight + (panel * PANEL + lane) * depth;
    for (int64_t t = 0; t < depth; ++t) to[t * PANEL + lane] = from[t];
  }
}

void pixel_conv_worker(void* opaque, int64_t slot) {
  PixelConvPlan& plan = *static_cast<PixelConvPlan*>(opaque);
  const PixelConvArguments& a = plan.args;
  const int64_t pitch = plan.pitch(), depth = plan.depth();
  float* rows = reinterpret_cast<float*>(plan.slots + slot * plan.slot_bytes);
  const vec least = splat(a.relu ? 0.0f : -__builtin_inff());
  for (;;) {
    const int64_t index = __atomic_fetch_add(&plan.next_row, 1, __ATOMIC_RELAXED);
    if (index >= a.batch * plan.rows) return;
    stage_rows(plan, a.x + index / plan.rows * a.channels * a.height * a.width, index % plan.rows, rows);
    float* y = a.y + index * plan.columns * a.outputs;
    for (int64_t panel = 0; panel < a.outputs / PANEL; ++panel) {
      vec bias[PANEL_VECTORS];
      for (int v = 0; v < PANEL_VECTORS; ++v) bias[v] = load(a.bias + panel * PANEL + v * WIDTH);
      for (int64_t column = 0; column < plan.columns; column += PANEL_ROWS) {
        PanelSums sums = {};
        const float* weight = plan.weight + panel * depth * PANEL;
        for (int64_t row = 0; row < a.channels * a.kernel; ++row, weight += a.kernel * PANEL)
          add_products(sums, rows + row * pitch + column * a.stride, a.stride, a.kernel, weight);
#pragma GCC unroll 12
        for (int r = 0; r < PANEL_ROWS; ++r) {
          if (column + r >= plan.columns) break;
#pragma GCC unroll 4
          for (int v = 0; v < PANEL_VECTORS; ++v)
            store(y + (column + r) * a.outputs + panel * PANEL + v * WIDTH, maximum(least, sums[r][v] + bias[v]));
        }
      }
    }
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
