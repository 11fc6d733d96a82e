// 3 x 3 convolution by Winograd's F(4 x 4, 3 x 3), for one instruction set (isa.h).
//
//   y = A' [ (G w G') . (B' x B) ] A      a tile of 4 x 4 outputs from 6 x 6 inputs, w 3 x 3
//
// Polynomials of degree 5 are told by their values at six points; here 0, 5/8, -5/8, 3/2, -3/2 and infinity. 36 products
// a tile instead of 144, and sums over input channels between the transforms: 36 products of matrices. With these points
// a result is off by 2.2 times what direct sums in fp32 are off by, 4.5 times with the usual 0, 1, -1, 2, -2.
// Source: Lavin & Gray 2016 (arXiv:1509.09308); for the choice of points Barabasz et al. 2018 (arXiv:1803.10986).
#include "conv3x3.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int SIDE = CONV3X3_SIDE, SEEN = CONV3X3_SEEN, POINTS = CONV3X3_POINTS;
constexpr int VECTORS = PANEL_VECTORS, ROWS = PANEL_ROWS;  // of a panel's row; tiles multiplied at a time
static_assert(CONV3X3_TILES % ROWS == 0, "groups are whole rows");

constexpr float P = 0.625f, Q = 1.5f, PP = P * P, QQ = Q * Q;  // the points; exact in fp32, and so are PP and QQ

// Each transform takes one column (or row) and gives another. T is a vector or a number.

template <class T>
LONGLLAVA_INLINE void transform_input(const T (&x)[6], T (&y)[6]) {
  const T even_p = x[4] - x[2] * QQ, odd_p = (x[3] - x[1] * QQ) * P;
  const T even_q = x[4] - x[2] * PP, odd_q = (x[3] - x[1] * PP) * Q;
  y[0] = x[0] * (PP * QQ) + (x[4] - x[2] * (PP + QQ));
  y[1] = even_p + odd_p;
  y[2] = even_p - odd_p;
  y[3] = even_q + odd_q;
  y[4] = even_q - odd_q;
  y[5] = x[1] * (PP * QQ) + (x[5] - x[3] * (PP + QQ));
}

template <class T>
LONGLLAVA_INLINE void transform_weight(const T (&w)[3], T (&y)[6]) {
  // the product of a point's distances from the others: p^2 (p^2 - q^2) twice over, and q^2 (q^2 - p^2)
  constexpr float of_p = float(1.0 / (2.0 * PP * (PP - QQ))), of_q = float(1.0 / (2.0 * QQ * (QQ - PP)));
  const T even_p = (w[0] + w[2] * PP) * of_p, odd_p = w[1] * (P * of_p);
  const T even_q = (w[0] + w[2] * QQ) * of_q, odd_q = w[1] * (Q * of_q);
  y[0] = w[0] * float(1.0 / (double(PP) * QQ));
  y[1] = even_p + odd_p;
  y[2] = even_p - odd_p;
  y[3] = even_q + odd_q;
  y[4] = even_q - odd_q;
  y[5] = w[2];
}

template <class T>
LONGLLAVA_INLINE void transform_output(const T (&x)[6], T (&y)[4]) {
  const T even_p = x[1] + x[2], odd_p = (x[1] - x[2]) * P, even_q = x[3] + x[4], odd_q = (x[3] - x[4]) * Q;
  y[0] = x[0] + even_p + even_q;
  y[1] = odd_p + odd_q;
  y[2] = even_p * PP + even_q * QQ;
  y[3] = odd_p * PP + (odd_q * QQ + x[5]);
}

struct Tile {
  int64_t picture, row, column;  // of its first output
};

LONGLLAVA_INLINE Tile tile_at(const Conv3x3Plan& plan, int64_t index) {
  const int64_t across = index / plan.tiles_across;
  return {across / plan.tiles_down, across % plan.tiles_down * SIDE, index % plan.tiles_across * SIDE};
}

// The six rows of inputs that a tile sees, each from its first column on, and which columns those are.
struct Window {
  const float* rows[SEEN];  // of zeros beyond the edges
  int first, end;           // the columns inside: 0 <= first < end <= SEEN

  Window(const Conv3x3Plan& plan, int64_t index, const float* nothing) {
    const Conv3x3Arguments& a = plan.args;
    const Tile tile = tile_at(plan, index);
    for (int i = 0; i < SEEN; ++i) {
      const int64_t row = tile.row + i - 1;
      const bool inside = row >= 0 && row < a.height;
      rows[i] = inside ? a.x + ((tile.picture * a.height + row) * a.width + tile.column - 1) * a.inputs : nothing;
    }
    first = tile.column == 0;
    end = a.width + 1 - tile.column < SEEN ? int(a.width + 1 - tile.column) : SEEN;
  }

  // Fetches the lines that hold the channels from c on of the columns that the window before has not seen.
  void fetch(int64_t inputs, int64_t c) const {
#pragma GCC unroll 6
    for (int i = 0; i < SEEN; ++i)
      for (int j = SEEN - SIDE; j < SEEN; ++j) __builtin_prefetch(rows[i] + j * inputs + c);
  }
};

// values[point][c] of one tile, `pitch` floats from point to point.
LONGLLAVA_INLINE void transform_tile(const Window& window, const Window& next, int64_t inputs, int64_t pitch,
                                     float* values) {
  for (int64_t c = 0; c < inputs; c += WIDTH) {
    if (c % 16 == 0) next.fetch(inputs, c);
    vec half[SEEN][SEEN];
#pragma GCC unroll 6
    for (int j = 0; j < SEEN; ++j) {
      vec column[6] = {}, transformed[6];
      const int64_t at = j * inputs + c;
      if (j >= window.first && j < window.end) {
#pragma GCC unroll 6
        for (int i = 0; i < SEEN; ++i) column[i] = load(window.rows[i] + at);
      }
      transform_input(column, transformed);
      for (int i = 0; i < SEEN; ++i) half[i][j] = transformed[i];
    }
    float* to = values + c;
#pragma GCC unroll 6
    for (int i = 0; i < SEEN; ++i) {
      vec transformed[6];
      transform_input(half[i], transformed);
#pragma GCC unroll 6
      for (int j = 0; j < SEEN; ++j, to += pitch) store(to, transformed[j]);
    }
  }
}

// products[tile][PANEL] = values[tile] weight, for ROWS tiles of one point
LONGLLAVA_INLINE void multiply_rows(const float* values, int64_t inputs, const float* weight, float* products) {
  PanelSums sums = {};
  add_products(sums, values, inputs, inputs, weight);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(products + r * PANEL + v * WIDTH, sums[r][v]);
}

// The outputs of one tile, from its first pixel on.
struct Target {
  const float* residual;  // null where there is none
  float* y;
  int64_t rows, columns;  // pixels inside

  Target(const Conv3x3Arguments& a, const Tile& tile) {
    const int64_t corner = ((tile.picture * a.height + tile.row) * a.width + tile.column) * a.outputs;
    residual = a.residual == nullptr ? nullptr : a.residual + corner;
    y = a.y + corner;
    rows = a.height - tile.row < SIDE ? a.height - tile.row : SIDE;
    columns = a.width - tile.column < SIDE ? a.width - tile.column : SIDE;
  }

  // Fetches the lines that the panel of channels from `first` on is written to; beyond the edge that does no harm.
  void fetch(int64_t down, int64_t across, int64_t first) const {
    for (int i = 0; i < SIDE; ++i) {
      for (int j = 0; j < SIDE; ++j) {
        const int64_t at = i * down + j * across + first;
        __builtin_prefetch(y + at, 1);
        if (residual != nullptr) __builtin_prefetch(residual + at);
      }
    }
  }
};

// y, in the panel of channels from `first` on, of products[point][PANEL], `pitch` floats from point to point.
LONGLLAVA_INLINE void write_tile(const Target& target, const Target& next, int64_t down, int64_t across,
                                 const float* products, int64_t pitch, const float* bias, int64_t first, vec least) {
  next.fetch(down, across, first);
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    vec half[SIDE][SEEN];
    const float* from = products + v * WIDTH;
#pragma GCC unroll 6
    for (int j = 0; j < SEEN; ++j) {
      vec column[6], transformed[4];
#pragma GCC unroll 6
      for (int i = 0; i < SEEN; ++i) column[i] = load(from + (i * SEEN + j) * pitch);
      transform_output(column, transformed);
      for (int i = 0; i < SIDE; ++i) half[i][j] = transformed[i];
    }
    const vec added = load(bias + first + v * WIDTH);
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; ++i) {
      vec transformed[4];
      transform_output(half[i], transformed);
      if (i >= target.rows) break;
#pragma GCC unroll 4
      for (int j = 0; j < SIDE; ++j) {
        if (j >= target.columns) break;
        const int64_t at = i * down + j * across + first + v * WIDTH;
        vec sum = transformed[j] + added;
        if (target.residual != nullptr) sum += load(target.residual + at);
        store(target.y + at, maximum(least, sum));  // NaN stays
      }
    }
  }
}

}  // namespace

// The weights of one panel of output channels, one channel to a lane.
void conv3x3_weight_task(void* opaque, int64_t panel) {
  const Conv3x3Plan& plan = *static_cast<const Conv3x3Plan*>(opaque);
  const int64_t inputs = plan.args.inputs, pitch = plan.weight_pitch();
  float* panel_start = plan.weight + panel * POINTS * pitch;
  for (int lane = 0; lane < PANEL; lane += WIDTH) {
    const float* from = plan.args.weight + (panel * PANEL + lane) * inputs * 9;
    for (int64_t block = 0; block < inputs; block += WIDTH) {
      alignas(64) float taps[WIDTH * 9][WIDTH];  // [c][3][3][lane]
      for (int square = 0; square < 9; ++square) {
        vec rows[WIDTH];
        for (int k = 0; k < WIDTH; ++k) rows[k] = load(from + (k * inputs + block) * 9 + square * WIDTH);
        transpose(rows);
        for (int k = 0; k < WIDTH; ++k) store(taps[square * WIDTH + k], rows[k]);
      }
      for (int c = 0; c < WIDTH; ++c) {
        float* to = panel_start + (block + c) * PANEL + lane;
        vec half[SEEN][3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const vec column[3] = {load(taps[c * 9 + j]), load(taps[c * 9 + 3 + j]), load(taps[c * 9 + 6 + j])};
          vec transformed[6];
          transform_weight(column, transformed);
          for (int i = 0; i < SEEN; ++i) half[i][j] = transformed[i];
        }
        for (int i = 0; i < SEEN; ++i) {
          vec transformed[6];
          transform_weight(half[i], transformed);
          for (int j = 0; j < SEEN; ++j, to += pitch) store(to, transformed[j]);
        }
      }
    }
  }
}

void conv3x3_worker(void* opaque, int64_t slot) {
  Conv3x3Plan& plan = *static_cast<Conv3x3Plan*>(opaque);
  const Conv3x3Arguments& a = plan.args;
  float* values = reinterpret_cast<float*>(plan.slots + slot * plan.slot_bytes);
  float* products = values + POINTS * plan.inputs_pitch();
  float* nothing = products + POINTS * plan.products_pitch();
  for (int64_t i = 0; i < SEEN * a.inputs; ++i) nothing[i] = 0;
  Target* targets = reinterpret_cast<Target*>(nothing + SEEN * a.inputs);
  const vec least = splat(a.relu ? 0.0f : -__builtin_inff());
  for (;;) {
    const int64_t first = __atomic_fetch_add(&plan.next_group, 1, __ATOMIC_RELAXED) * plan.group;
    if (first >= plan.n_tiles) return;
    const int64_t n = plan.n_tiles - first < plan.group ? plan.n_tiles - first : plan.group;
    const int64_t n_rows = (n + ROWS - 1) / ROWS * ROWS;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t next = first + t + 1 < plan.n_tiles ? first + t + 1 : first + t;
      transform_tile(Window(plan, first + t, nothing), Window(plan, next, nothing), a.inputs, plan.inputs_pitch(),
                     values + t * a.inputs);
    }
    for (int point = 0; point < POINTS; ++point)  // rows without a tile are multiplied and not read
      for (int64_t i = n * a.inputs; i < n_rows * a.inputs; ++i) values[point * plan.inputs_pitch() + i] = 0;
    for (int64_t t = 0; t < n; ++t) targets[t] = Target(a, tile_at(plan, first + t));
    for (int64_t panel = 0; panel < a.outputs / PANEL; ++panel) {
      const float* weight = plan.weight + panel * POINTS * plan.weight_pitch();
      for (int point = 0; point < POINTS; ++point)
        for (int64_t t = 0; t < n_rows; t += ROWS)
          multiply_rows(values + point * plan.inputs_pitch() + t * a.inputs, a.inputs,
                        weight + point * plan.weight_pitch(), products + point * plan.products_pitch() + t * PANEL);
      for (int64_t t = 0; t < n; ++t)
        write_tile(targets[t], targets[t + 1 < n ? t + 1 : 0], a.width * a.outputs, a.outputs, products + t * PANEL,
                   plan.products_pitch(), a.bias, panel * PANEL, least);
    }
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
