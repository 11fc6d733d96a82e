// Int8 products in registers, and a worker's tasks. Include from *_kernels.cpp only.
//
// A tile of ROWS x VECTORS vectors of sums stays in registers: per step VECTORS loads of packed weights and ROWS
// broadcasts of DEPTH inputs feed ROWS x VECTORS products. Quantised rows lie an odd number of cache lines apart, or
// those of 4,096 inputs would all fall into one set of the first-level cache.
#pragma once

#include "int8_pack.h"
#include "int8_rows.h"
#include "int8_write.h"

namespace longllava {
namespace LONGLLAVA_FORM {

#if defined(LONGLLAVA_AMX)
// The lines of memory that a tile will write, fetched some rows at a time while it is multiplied: rows of y lie apart,
// and a store that has to wait for its line holds up those behind it (1.06 times as fast in all, 192 inputs, bf16).
struct Wanted {
  const char* line;
  int64_t row;
  int rows;

  Wanted(const Tile& t, int most) : line(static_cast<const char*>(t.y)) {
    row = t.y_row * (t.y_dtype == DTYPE_FLOAT32 ? 4 : 2);
    rows = !t.last ? 0 : t.rows < most ? t.rows : most;
  }
  void fetch(int n) {
    for (n = n < rows ? n : rows, rows -= n; n > 0; --n, line += row) __builtin_prefetch(line, 1);
  }
};

// What earlier blocks of inputs left in t.sums, if any, plus rows of x times a panel: to t.sums if blocks follow, else
// to `sums`. Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights, whose rows are steps. Steps come in sixteens: x is
// filled up with zeros. Between them the tile before is written, by units that the products leave free.
template <class Dot, int R>
LONGLLAVA_INLINE void sum_tile(const typename Dot::Element* x, int64_t pitch, const typename Dot::Element* panel,
                               int64_t n_steps, const Tile& t, ivec (&sums)[ROWS][VECTORS], Finished<Dot>& before) {
  const int64_t across = t.sums_row * 4;
  memory_is_read();
  if (t.first) {
    _tile_zero(0);
    _tile_zero(1);
    if (R > 16) _tile_zero(2);
    if (R > 16) _tile_zero(3);
  } else {
    _tile_loadd(0, t.sums, across);
    _tile_loadd(1, t.sums + 16, across);
    if (R > 16) _tile_loadd(2, t.sums + 16 * t.sums_row, across);
    if (R > 16) _tile_loadd(3, t.sums + 16 * t.sums_row + 16, across);
  }
  const int share = n_steps > 0 ? int((before.rows * 16 + n_steps - 1) / n_steps) : 0;  // of its rows, for each step
  Wanted wanted(t, R);
  const int lines = n_steps > 0 ? int((wanted.rows * 16 + n_steps - 1) / n_steps) : 0;
  for (int64_t step = 0; step < n_steps; step += 16, x += 64, panel += 16 * TILE_OUTPUTS * 4) {
    _tile_loadd(6, panel, TILE_OUTPUTS * 4);
    _tile_loadd(4, x, pitch);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, panel + 64, TILE_OUTPUTS * 4);
    _tile_dpbssd(1, 4, 7);
    if (R > 16) {
      _tile_loadd(5, x + 16 * pitch, pitch);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    wanted.fetch(lines);
    before.write(share);
  }
  before.write(ROWS);
  int32_t* to = t.last ? reinterpret_cast<int32_t*>(&sums[0][0]) : t.sums;
  const int64_t to_row = t.last ? TILE_OUTPUTS : t.sums_row;
  _tile_stored(0, to, to_row * 4);
  _tile_stored(1, to + 16, to_row * 4);
  if (R > 16) _tile_stored(2, to + 16 * to_row, to_row * 4);
  if (R > 16) _tile_stored(3, to + 16 * to_row + 16, to_row * 4);
  memory_is_read();
}
#else
// What earlier blocks of inputs left in t.sums, if any, plus rows of x times a panel: to t.sums if blocks follow, else
// to `sums`.
template <class Dot, int R>
LONGLLAVA_INLINE void sum_tile(const typename Dot::Element* x, int64_t pitch, const typename Dot::Element* panel,
                               int64_t n_steps, const Tile& t, ivec (&result)[ROWS][VECTORS], Finished<Dot>&) {
  ivec sums[R][VECTORS] = {};
  if (!t.first)
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < VECTORS; ++j)
        __builtin_memcpy(&sums[i][j], t.sums + i * t.sums_row + j * WIDTH, sizeof(ivec));
  const typename Dot::Element* three[R / 3];  // rows in threes: one address each, the pitch once and twice
#pragma GCC unroll 4
  for (int i = 0; i < R / 3; ++i) three[i] = x + 3 * i * pitch;
  for (int64_t step = 0; step < n_steps; ++step, panel += TILE_OUTPUTS * Dot::DEPTH) {
    ivec weights[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) __builtin_memcpy(&weights[j], panel + j * WIDTH * Dot::DEPTH, sizeof(ivec));
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      int32_t one;
      __builtin_memcpy(&one, three[i / 3] + i % 3 * pitch, sizeof one);
      const ivec broadcast = ivec{} + one;
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = Dot::add(sums[i][j], weights[j], broadcast);
    }
#pragma GCC unroll 4
    for (int i = 0; i < R / 3; ++i) three[i] += Dot::DEPTH;
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < VECTORS; ++j)
      if (t.last) result[i][j] = sums[i][j];
      else __builtin_memcpy(t.sums + i * t.sums_row + j * WIDTH, &sums[i][j], sizeof(ivec));
}
#endif

template <class Dot, int R>
__attribute__((noinline)) static void tile(const typename Dot::Element* x, int64_t pitch,
                                           const typename Dot::Element* panel, int64_t n_steps, const Tile& t,
                                           Finished<Dot>& now, Finished<Dot>& before) {
  sum_tile<Dot, R>(x, pitch, panel, n_steps, t, now.sums, before);
  if (!t.last) return;
  now.open(t, R);
  if (!OVERLAPS) now.write(R);
}

// Rows begin .. end - 1, quantised at x (the first of them), by a block of packed weights.
template <class Dot>
LONGLLAVA_INLINE void multiply_block(const Int8Plan& plan, const typename Dot::Element* x, const float* row_scale,
                                     const int32_t* row_sum, int64_t begin, int64_t end, int64_t expert,
                                     int64_t output, int64_t n_outputs, int64_t input, int64_t n_inputs,
                                     const typename Dot::Element* packed, int32_t* sums) {
  const Int8Arguments& a = plan.args;
  const int64_t panel = int8_round_up(n_inputs, WIDTH * Dot::DEPTH) * TILE_OUTPUTS;
  const int64_t n_steps = (n_inputs + Dot::DEPTH - 1) / Dot::DEPTH, place = expert * a.outputs + output;
  const int64_t element = a.y_dtype == DTYPE_FLOAT32 ? 4 : 2;
  Finished<Dot> finished[2];
  int turn = 0;
  Tile t{};
  t.first = input == 0;
  t.last = input + n_inputs == a.inputs;
  t.sums_row = plan.step_outputs;
  t.y_dtype = a.y_dtype;
  t.y_row = a.outputs;
  for (int64_t group = begin; group < end; group += ROWS_TOGETHER) {
    const int64_t group_end = group + ROWS_TOGETHER < end ? group + ROWS_TOGETHER : end;
    for (int64_t n = 0; n < n_outputs; n += TILE_OUTPUTS) {
      t.outputs = int(n_outputs - n < TILE_OUTPUTS ? n_outputs - n : TILE_OUTPUTS);
      t.scale = a.scale + place + n;
      t.bias = a.bias != nullptr ? a.bias + place + n : nullptr;
      const typename Dot::Element* weights = packed + n / TILE_OUTPUTS * panel;
      for (int64_t row = group; row < group_end; row += t.rows) {
        // a few rows at the end go in threes, unless a whole tile costs no more
        const bool few = end - row <= ROWS / 2;
        const int64_t most = few ? FEWER_ROWS : ROWS, i = row - begin;
        t.rows = int(group_end - row < most ? group_end - row : most);
        t.row_scale = row_scale + i;
        t.row_sum = row_sum + i;
        t.sums = sums + i * plan.step_outputs + n;
        t.y = static_cast<char*>(a.y) + (row * a.outputs + output + n) * element;
        const typename Dot::Element* from = x + i * plan.pitch + input;
        Finished<Dot> &now = finished[turn], &before = finished[1 - turn];
        if (few) tile<Dot, FEWER_ROWS>(from, plan.pitch, weights, n_steps, t, now, before);
        else tile<Dot, ROWS>(from, plan.pitch, weights, n_steps, t, now, before);
        turn = 1 - turn;
      }
    }
  }
  finished[1 - turn].write(ROWS);
}

template <class Dot>
LONGLLAVA_INLINE void quantise_rows(const Int8Plan& plan, int64_t begin, int64_t end, typename Dot::Element* out,
                                    float* scale, int32_t* sum) {
  for (int64_t row = begin; row < end; ++row, out += plan.pitch, ++scale, ++sum) {
    *sum = prepare_row<Dot::OFFSET != 0>(plan.args, row, out, scale);
    for (int64_t k = plan.args.inputs; k % PADDING != 0; ++k) out[k] = 0;
  }
}

template <class Dot>
LONGLLAVA_INLINE void pack_all(const Int8Plan& plan) {
  const Int8Arguments& a = plan.args;
  pack<Dot>(a.weight, a.inputs, a.outputs, a.inputs, reinterpret_cast<typename Dot::Element*>(plan.packed));
}

// Small weights, packed for all: a task is some rows.
template <class Dot>
LONGLLAVA_INLINE void small_task(const Int8Plan& plan, int64_t task, char* slot) {
  typedef typename Dot::Element Element;
  const Int8Arguments& a = plan.args;
  const int64_t begin = task * INT8_SMALL_CHUNK;
  const int64_t end = begin + INT8_SMALL_CHUNK < a.rows ? begin + INT8_SMALL_CHUNK : a.rows;
  Element* x = reinterpret_cast<Element*>(slot);
  float* scale = reinterpret_cast<float*>(slot + (INT8_SMALL_CHUNK + ROWS) * plan.pitch * int64_t(sizeof(Element)));
  int32_t* sum = reinterpret_cast<int32_t*>(scale + INT8_SMALL_CHUNK + ROWS);
  quantise_rows<Dot>(plan, begin, end, x, scale, sum);
  multiply_block<Dot>(plan, x, scale, sum, begin, end, 0, 0, a.outputs, 0, a.inputs,
                      reinterpret_cast<const Element*>(plan.packed), sum);
}

// Large weights: a task is a block of outputs, packed in the worker's slot, for a chunk of an expert's rows.
template <class Dot>
LONGLLAVA_INLINE void large_task(const Int8Plan& plan, int64_t task, char* slot) {
  typedef typename Dot::Element Element;
  const Int8Arguments& a = plan.args;
  const int32_t* rows = plan.row_tasks + task / plan.n_outputs_steps * 3;
  const int64_t expert = rows[0], begin = rows[1], end = rows[2];
  const int64_t output = task % plan.n_outputs_steps * plan.step_outputs;
  const int64_t n_outputs = a.outputs - output < plan.step_outputs ? a.outputs - output : plan.step_outputs;
  const int8_t* weight = a.weight + (expert * a.outputs + output) * a.inputs;
  Element* packed = reinterpret_cast<Element*>(slot);
  int32_t* sums = reinterpret_cast<int32_t*>(slot + plan.packed_bytes);
  const Element* x = static_cast<const Element*>(plan.quantised) + begin * plan.pitch;
  for (int64_t input = 0; input < a.inputs; input += plan.step_inputs) {
    const int64_t n_inputs = a.inputs - input < plan.step_inputs ? a.inputs - input : plan.step_inputs;
    pack<Dot>(weight + input, a.inputs, n_outputs, n_inputs, packed);
    multiply_block<Dot>(plan, x, plan.row_scale + begin, plan.row_sum + begin, begin, end, expert, output, n_outputs,
                        input, n_inputs, packed, sums);
  }
}

// A worker takes tasks until none is left. Rows are quantised by all before the first product: whoever comes early
// waits for what others have begun.
template <class Dot>
LONGLLAVA_INLINE void work(Int8Plan& plan, int64_t number) {
  typedef typename Dot::Element Element;
  char* slot = plan.slots + number * plan.slot_bytes;
#if defined(LONGLLAVA_AMX)
  const TileRegisters tiles;
#endif
  if (!plan.small) {
    const int64_t rows = plan.args.rows;
    for (int64_t begin; (begin = __atomic_fetch_add(&plan.next_rows, INT8_SMALL_CHUNK, __ATOMIC_RELAXED)) < rows;) {
      const int64_t end = begin + INT8_SMALL_CHUNK < rows ? begin + INT8_SMALL_CHUNK : rows;
      quantise_rows<Dot>(plan, begin, end, static_cast<Element*>(plan.quantised) + begin * plan.pitch,
                         plan.row_scale + begin, plan.row_sum + begin);
      __atomic_fetch_add(&plan.done_rows, end - begin, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(&plan.done_rows, __ATOMIC_ACQUIRE) < rows) {
    }
  }
  for (int64_t task; (task = __atomic_fetch_add(&plan.next_task, 1, __ATOMIC_RELAXED)) < plan.n_tasks;) {
    if (plan.small) small_task<Dot>(plan, task, slot);
    else large_task<Dot>(plan, task, slot);
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
