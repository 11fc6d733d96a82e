// Int8 products in registers, and a worker's tasks. Include from *_kernels.cpp only.
//
// A tile of ROWS x VECTORS vectors of sums stays in registers: per step VECTORS loads of packed weights and ROWS
// broadcasts of DEPTH inputs feed ROWS x VECTORS products. Quantised rows lie an odd number of cache lines apart, or
// those of 4,096 inputs would all fall into one set of the first-level cache.
#pragma once

#include "int8_rows.h"
#include "int8_write.h"

#if defined(LONGLLAVA_AMX)
#include "int8_tiles.h"
#endif

namespace longllava {
namespace LONGLLAVA_FORM {

#if !defined(LONGLLAVA_AMX)
// What earlier blocks of inputs left in `kept`, if any, plus R rows of x times a panel; back to it, if blocks follow,
// else to y.
template <class Dot, int R, class Out>
__attribute__((noinline)) static void tile(const typename Dot::Element* x, int64_t pitch,
                                           const typename Dot::Element* panel, int64_t n_steps, const Tile<Out>& t,
                                           int32_t* kept, int64_t kept_row, bool first, bool last) {
  ivec sums[R][VECTORS] = {};
  if (!first)
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < VECTORS; ++j) __builtin_memcpy(&sums[i][j], kept + i * kept_row + j * WIDTH, sizeof(ivec));
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
  if (last) {
    write_rows<Dot, R>(t, sums, 0);
    return;
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < VECTORS; ++j) __builtin_memcpy(kept + i * kept_row + j * WIDTH, &sums[i][j], sizeof(ivec));
}

// Rows begin .. end - 1, quantised at x (the first of them), by a block of packed weights.
template <class Dot, class Out>
LONGLLAVA_INLINE void multiply_block(const Int8Plan& plan, const typename Dot::Element* x, const float* row_scale,
                                     const int32_t* row_sum, int64_t begin, int64_t end, int64_t expert,
                                     int64_t output, int64_t n_outputs, int64_t input, int64_t n_inputs,
                                     const typename Dot::Element* packed, int32_t* sums) {
  const Int8Arguments& a = plan.args;
  const int64_t panel = int8_round_up(n_inputs, WIDTH * Dot::DEPTH) * TILE_OUTPUTS;
  const int64_t n_steps = (n_inputs + Dot::DEPTH - 1) / Dot::DEPTH, place = expert * a.outputs + output;
  const bool first = input == 0, last = input + n_inputs == a.inputs;
  Tile<Out> t{};
  t.y_row = a.outputs;
  for (int64_t group = begin; group < end; group += ROWS) {
    const int64_t group_end = group + ROWS < end ? group + ROWS : end;
    // a few rows at the end go in threes, unless a whole tile costs no more
    const bool few = group_end - group <= ROWS / 2;
    const auto multiply = few ? tile<Dot, FEWER_ROWS, Out> : tile<Dot, ROWS, Out>;
    for (int64_t n = 0; n < n_outputs; n += TILE_OUTPUTS) {
      t.outputs = int(n_outputs - n < TILE_OUTPUTS ? n_outputs - n : TILE_OUTPUTS);
      t.scale = a.scale + place + n;
      t.bias = a.bias != nullptr ? a.bias + place + n : nullptr;
      for (int64_t row = group; row < group_end; row += t.rows) {
        const int64_t most = few ? FEWER_ROWS : ROWS, i = row - begin;
        t.rows = int(group_end - row < most ? group_end - row : most);
        t.row_scale = row_scale + i;
        t.row_sum = row_sum + i;
        t.y = static_cast<Out*>(a.y) + row * a.outputs + output + n;
        multiply(x + i * plan.pitch + input, plan.pitch, packed + n / TILE_OUTPUTS * panel, n_steps, t,
                 sums + i * plan.step_outputs + n, plan.step_outputs, first, last);
      }
    }
  }
}
#endif

template <class Dot, class... Rest>
LONGLLAVA_INLINE void multiply(const Int8Plan& plan, Rest... rest) {
  if (plan.args.y_dtype == DTYPE_FLOAT32) multiply_block<Dot, float>(plan, rest...);
  else multiply_block<Dot, uint16_t>(plan, rest...);
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
  multiply<Dot>(plan, x, scale, sum, begin, end, 0, 0, a.outputs, 0, a.inputs,
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
    multiply<Dot>(plan, x, plan.row_scale + begin, plan.row_sum + begin, begin, end, expert, output, n_outputs, input,
                  n_inputs, packed, sums);
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
