// The C interface of the int8 linear layers, and what their entry file and their kernels share.
//
//   y = x_scale * (scale * weight) x + bias, x quantised row by row (dynamic) or taken as it is (few rows)
//
// longllava/ops/int8_linear/cpu.py fills Int8Arguments field by field, in this order, 8 bytes each.
#pragma once

#include "isa.h"
#include "vector.h"

namespace longllava {

constexpr int64_t DTYPE_INT8 = 2;
constexpr int64_t INT8_INPUTS = 4096;    // of a block of packed weights: with INT8_OUTPUTS 512 KB of int8, half of the
constexpr int64_t INT8_OUTPUTS = 128;    // second-level cache
constexpr int64_t INT8_CHUNK = 2016;     // rows that a task multiplies by one such block: 1 MB of int32 sums
constexpr int64_t INT8_SMALL = 1 << 19;  // weights of fewer bytes are packed once, and tasks are rows alone
constexpr int64_t INT8_SMALL_CHUNK = 96;   // rows of such a task, and of one that quantises
constexpr int64_t INT8_FEW_INPUTS = 16;    // few rows are padded to a multiple of these, which every WIDTH divides
constexpr int64_t INT8_FEW_OUTPUTS = 4;    // of few rows, computed together, and by tiles
constexpr int64_t INT8_FEW_TILED = 32;
constexpr int64_t ROTATED_MAX_WIDTH = 32768;  // of a row that is rotated, in fp32: 128 KB of a task's stack

struct Int8Arguments {
  int64_t bytes;  // sizeof(Int8Arguments)
  int64_t rows, inputs, outputs, experts, threads;
  int64_t depth;      // products in one step: 0 what is fastest here, 2 or 4 (which tests ask for)
  const void* x;      // (rows, inputs), x_row elements from row to row
  int64_t x_dtype, x_row;
  const float *x_scale, *absmax;  // (rows): of int8 x; the largest magnitudes, where known; else null
  const int8_t* weight;           // (experts, outputs, inputs)
  const float *scale, *bias;      // (experts, outputs); bias may be null
  const int32_t* offsets;         // (experts + 1), or null: all rows meet one expert
  void* y;                        // (rows, outputs) without gaps
  int64_t y_dtype;
  int8_t* values;  // quantisation alone: (rows, inputs) and (rows)
  float* values_scale;
  int64_t rotated;  // quantisation alone: of rotated rows; without values these rows go to y, in x's dtype
};

struct Int8Plan {
  Int8Arguments args;
  int64_t depth;       // 2: int16 in pairs, 4: int8 in fours
  int64_t pitch;       // elements from one quantised row to the next; few rows in tiles: from 16 to the next
  bool small;          // weights are packed once, in `packed`; a task quantises its own rows
  int64_t step_inputs, step_outputs;  // of a block of packed weights
  int64_t n_outputs_steps, n_row_tasks, n_tasks;
  void* quantised;     // (rows + a tile, pitch) int16 or int8
  float* row_scale;    // (rows + a tile)
  int32_t* row_sum;    // (rows + a tile), depth 4 alone
  const int32_t* row_tasks;  // (n_row_tasks, 3): expert, first row, end
  char* slots;         // a worker's own memory, slot_bytes each
  int64_t slot_bytes, packed_bytes;  // packed_bytes: of a slot, or of `packed`
  char* packed;
  int64_t next_rows, done_rows, next_task;  // counters that workers share
};

constexpr int64_t int8_round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace longllava

// Registers hold a tile of rows x vectors x lanes of sums.
LONGLLAVA_DECLARE(void, int8_tile, (int64_t * rows, int64_t* outputs))
LONGLLAVA_DECLARE(void, int8_pairs_worker, (void* plan, int64_t slot))
LONGLLAVA_DECLARE(void, int8_fours_worker, (void* plan, int64_t slot))
LONGLLAVA_DECLARE(void, int8_pairs_pack, (void* plan))
LONGLLAVA_DECLARE(void, int8_fours_pack, (void* plan))
LONGLLAVA_DECLARE(void, int8_quantize_task, (void* plan, int64_t task))
LONGLLAVA_DECLARE(void, int8_few_rows_widen, (void* plan))
LONGLLAVA_DECLARE(void, int8_few_rows_task, (void* plan, int64_t task))
#if defined(__x86_64__)
namespace longllava {
namespace avx512vnni {
void int8_fours_worker(void* plan, int64_t slot);
}
namespace avx512amx {
void int8_tile(int64_t* rows, int64_t* outputs);
void int8_fours_pack(void* plan);
void int8_fours_worker(void* plan, int64_t slot);
int64_t int8_few_rows_pitch(const Int8Arguments& args);  // of 16 packed rows, in bf16
void int8_few_rows_pack(void* plan);
void int8_few_rows_task(void* plan, int64_t task);
}
}  // namespace longllava
#endif
