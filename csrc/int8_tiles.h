// Int8 products by AMX's tiles. Include from *_amx_kernels.cpp only.
//
// Registers 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights, whose rows are steps. Three tiles of sums are under
// way at once. One is multiplied. The one before it leaves the registers between the first products, each of which
// waits for its own register alone: stored after the last product, all four would hold up what follows (192 inputs:
// 280 cycles a tile instead of 200). The one before that is written, some rows a step, by units that products leave
// free.
#pragma once

#include "int8_write.h"

namespace longllava {
namespace LONGLLAVA_FORM {

constexpr int ROWS_WRITTEN = 4;  // at once

// A tile of sums, and what becomes of them: `tile` is written from there, if it has rows; else blocks of inputs follow.
template <class Out>
struct Sums {
  Tile<Out> tile;
  int32_t* at;
  int64_t row;  // from one to the next
};

// One register of what was multiplied before goes to memory; zeros, or what earlier blocks of inputs gave, come.
#define LONGLLAVA_EXCHANGE(number, i, j)                                                     \
  if (held.at != nullptr) _tile_stored(number, held.at + (i) * held.row + (j), held.row * 4); \
  if (input == 0) _tile_zero(number);                                                        \
  else _tile_loadd(number, now.at + (i) * now.row + (j), now.row * 4)

// Rows begin .. end - 1, quantised at x (the first of them), by a block of packed weights; at least one input. Steps
// come in sixteens: x is filled up with zeros.
template <class Dot, class Out>
LONGLLAVA_INLINE void multiply_block(const Int8Plan& plan, const typename Dot::Element* x, const float* row_scale,
                                     const int32_t* row_sum, int64_t begin, int64_t end, int64_t expert,
                                     int64_t output, int64_t n_outputs, int64_t input, int64_t n_inputs,
                                     const typename Dot::Element* packed, int32_t* sums) {
  const Int8Arguments& a = plan.args;
  const int64_t pitch = plan.pitch, place = expert * a.outputs + output;
  const int n_steps = int((n_inputs + PADDING - 1) / PADDING);
  const int share = (ROWS / ROWS_WRITTEN + n_steps - 1) / n_steps * ROWS_WRITTEN;  // of the rows, for each step
  const bool last = input + n_inputs == a.inputs;
  ivec written[2][ROWS][VECTORS];
  Sums<Out> now{}, held{}, ready{};
  now.tile.y_row = a.outputs;
  now.row = plan.step_outputs;
  int turn = 0;
  for (int64_t group = begin; group < end; group += ROWS_TOGETHER) {
    const int64_t group_end = group + ROWS_TOGETHER < end ? group + ROWS_TOGETHER : end;
    for (int64_t n = 0; n < n_outputs; n += TILE_OUTPUTS) {
      now.tile.scale = a.scale + place + n;
      now.tile.bias = a.bias != nullptr ? a.bias + place + n : nullptr;
      now.tile.outputs = int(n_outputs - n < TILE_OUTPUTS ? n_outputs - n : TILE_OUTPUTS);
      for (int64_t row = group; row < group_end; row += ROWS) {
        const int64_t i = row - begin;
        const int rows = int(group_end - row < ROWS ? group_end - row : ROWS);
        const bool wide = rows > ROWS / 2;
        now.tile.row_scale = row_scale + i;
        now.tile.row_sum = row_sum + i;
        now.tile.rows = last ? rows : 0;
        now.tile.y = static_cast<Out*>(a.y) + row * a.outputs + output + n;
        now.at = sums + i * plan.step_outputs + n;
        const typename Dot::Element *from = x + i * pitch + input, *weights = packed + n * n_steps * PADDING;
        memory_is_read();
        for (int step = 0; step < n_steps; ++step, from += PADDING, weights += TILE_OUTPUTS * PADDING) {
          const bool first = step == 0;
          _tile_loadd(6, weights, TILE_OUTPUTS * 4);
          _tile_loadd(4, from, pitch);
          if (first) {
            LONGLLAVA_EXCHANGE(0, 0, 0);
          }
          _tile_dpbssd(0, 4, 6);
          _tile_loadd(7, weights + PADDING, TILE_OUTPUTS * 4);
          if (first) {
            LONGLLAVA_EXCHANGE(1, 0, 16);
          }
          _tile_dpbssd(1, 4, 7);
          if (wide) _tile_loadd(5, from + 16 * pitch, pitch);
          if (first) {
            LONGLLAVA_EXCHANGE(2, 16, 0);
          }
          if (wide) _tile_dpbssd(2, 5, 6);
          if (first) {
            LONGLLAVA_EXCHANGE(3, 16, 16);
          }
          if (wide) _tile_dpbssd(3, 5, 7);
          if (first) memory_is_read();
          const int stop = (step + 1) * share < ROWS ? (step + 1) * share : ROWS;
          for (int r = step * share; r < stop; r += ROWS_WRITTEN) {
            // lines that this tile will be written to: a store that waits for its line holds up those behind it
            if (r < now.tile.rows)
              for (int k = 0; k < ROWS_WRITTEN; ++k) __builtin_prefetch(now.tile.y + (r + k) * a.outputs, 1);
            if (r < ready.tile.rows) write_rows<Dot, ROWS_WRITTEN>(ready.tile, written[turn], r);
          }
        }
        ready = held;
        held = now;
        if (last) {
          held.at = reinterpret_cast<int32_t*>(&written[turn][0][0]);
          held.row = TILE_OUTPUTS;
        }
        turn = 1 - turn;
      }
    }
  }
  if (held.at == nullptr) return;
  _tile_stored(0, held.at, held.row * 4);
  _tile_stored(1, held.at + 16, held.row * 4);
  _tile_stored(2, held.at + 16 * held.row, held.row * 4);
  _tile_stored(3, held.at + 16 * held.row + 16, held.row * 4);
  memory_is_read();
  for (int r = 0; r < ready.tile.rows; r += ROWS_WRITTEN) write_rows<Dot, ROWS_WRITTEN>(ready.tile, written[turn], r);
  for (int r = 0; r < held.tile.rows; r += ROWS_WRITTEN) write_rows<Dot, ROWS_WRITTEN>(held.tile, written[1 - turn], r);
}
#undef LONGLLAVA_EXCHANGE

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
