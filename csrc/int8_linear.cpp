// Entry points of the int8 linear layers: makes the plan and hands its tasks to threads.
#define LONGLLAVA_FORM entry
#include "int8_linear.h"
#include "entry.h"
#include "memory.h"

using namespace longllava;

namespace {

// Nanoseconds of so many products on one core, roughly: enough to choose threads by.
double product_time(const Int8Arguments& a) { return double(a.rows) * a.inputs * a.outputs / 200.0; }

// (expert, first row, end) of each chunk of rows.
std::vector<int32_t> row_tasks(const Int8Arguments& a) {
  std::vector<int32_t> out;
  for (int64_t expert = 0; expert < a.experts; ++expert) {
    const int64_t first = a.offsets != nullptr ? a.offsets[expert] : 0;
    const int64_t end = a.offsets != nullptr ? a.offsets[expert + 1] : a.rows;
    for (int64_t row = first; row < end; row += INT8_CHUNK)
      for (int64_t x : {expert, row, std::min(row + INT8_CHUNK, end)}) out.push_back(static_cast<int32_t>(x));
  }
  return out;
}

void multiply(const Int8Arguments& a) {
  Int8Plan plan{};
  plan.args = a;
  bool fast = false, tiles = false;
#if defined(__x86_64__)
  fast = has_avx512_vnni();
#if defined(LONGLLAVA_HAS_AMX)
  tiles = fast && a.depth == 0 && has_amx();
#endif
#endif
  plan.depth = a.depth != 0 ? a.depth : fast ? 4 : 2;
  const int64_t element = plan.depth == 4 ? 1 : 2;
  int64_t tile_rows = 0, tile_outputs = 0;
  void (*measure)(int64_t*, int64_t*) = LONGLLAVA_PICK(int8_tile);
  void (*worker)(void*, int64_t) = LONGLLAVA_PICK(int8_pairs_worker);
  void (*packer)(void*) = LONGLLAVA_PICK(int8_pairs_pack);
  if (plan.depth == 4) {
    worker = LONGLLAVA_PICK(int8_fours_worker);
    packer = LONGLLAVA_PICK(int8_fours_pack);
  }
#if defined(__x86_64__)
  if (plan.depth == 4 && fast) worker = avx512vnni::int8_fours_worker;
#if defined(LONGLLAVA_HAS_AMX)
  if (tiles) {
    measure = avx512amx::int8_tile;
    worker = avx512amx::int8_fours_worker;
    packer = avx512amx::int8_fours_pack;
  }
#endif
#endif
  measure(&tile_rows, &tile_outputs);
  // an odd number of cache lines
  plan.pitch = (int8_round_up(a.inputs * element, 128) + 64) / element;
  plan.step_inputs = std::min(a.inputs, INT8_INPUTS / element);
  plan.small = a.offsets == nullptr && a.inputs * a.outputs * element <= INT8_SMALL && a.rows > INT8_SMALL_CHUNK;
  if (plan.small) plan.step_inputs = a.inputs;
  plan.step_outputs = plan.small ? int8_round_up(a.outputs, tile_outputs)
                                 : std::min(INT8_OUTPUTS, int8_round_up(a.outputs, tile_outputs));
  plan.packed_bytes = plan.step_outputs * int8_round_up(plan.step_inputs, 64) * element;
  const int threads = useful_threads(a.threads, product_time(a));
  std::vector<int32_t> tasks;
  Memory rows, packed;
  if (plan.small) {
    plan.n_tasks = ceil_div(a.rows, INT8_SMALL_CHUNK);
    plan.slot_bytes = (INT8_SMALL_CHUNK + tile_rows) * (plan.pitch * element + 8);
    packed = memory(plan.packed_bytes);
    plan.packed = packed.get();
  } else {
    tasks = row_tasks(a);
    plan.row_tasks = tasks.data();
    plan.n_row_tasks = static_cast<int64_t>(tasks.size()) / 3;
    plan.n_outputs_steps = ceil_div(a.outputs, plan.step_outputs);
    // few outputs, or few rows: blocks narrow enough for every thread to have some
    while (plan.n_outputs_steps * plan.n_row_tasks < 4 * threads && plan.step_outputs > tile_outputs) {
      plan.step_outputs = int8_round_up(plan.step_outputs / 2, tile_outputs);
      plan.n_outputs_steps = ceil_div(a.outputs, plan.step_outputs);
    }
    plan.n_tasks = plan.n_row_tasks * plan.n_outputs_steps;
    const int64_t longest = std::min(a.rows, INT8_CHUNK) + tile_rows;
    plan.slot_bytes = plan.packed_bytes + (a.inputs > plan.step_inputs ? longest * plan.step_outputs * 4 : 0);
    const int64_t padded = a.rows + tile_rows;
    rows = memory(padded * (plan.pitch * element + 8));
    plan.quantised = rows.get();
    plan.row_scale = reinterpret_cast<float*>(rows.get() + padded * plan.pitch * element);
    plan.row_sum = reinterpret_cast<int32_t*>(plan.row_scale + padded);
  }
  plan.slot_bytes = int8_round_up(plan.slot_bytes, 64);
  const Memory slots = memory(threads * plan.slot_bytes);
  plan.slots = slots.get();
  if (plan.small) packer(&plan);
  parallel_for(threads, threads, worker, &plan);
}

}  // namespace

// All return 0, or 1 when memory ran out, or 2 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_int8_linear(const Int8Arguments* args) { return guarded(args, multiply); }

LONGLLAVA_EXPORT int longllava_quantize_rows(const Int8Arguments* args) {
  return guarded(args, [](const Int8Arguments& a) {
    Int8Plan plan{};
    plan.args = a;
    const int threads = useful_threads(a.threads, 0.3 * a.rows * a.inputs);
    parallel_for(ceil_div(a.rows, INT8_SMALL_CHUNK), threads, LONGLLAVA_PICK(int8_quantize_task), &plan);
  });
}

// Rows of bf16 by tiles where there are some, else widened to fp32. One row alone, or one an expert, takes as long as
// its weights' way from memory without tiles, and half as long again with them.
LONGLLAVA_EXPORT int longllava_int8_few_rows(const Int8Arguments* args) {
  return guarded(args, [](const Int8Arguments& a) {
    Int8Plan plan{};
    plan.args = a;
    // a row of weights costs memory's time, or that of its products with several rows
    const double nanoseconds = double(a.inputs) * a.outputs * (0.05 + 0.05 * a.rows);
    const int threads = useful_threads(a.threads, nanoseconds);
    int64_t step = INT8_FEW_OUTPUTS;
    void (*task)(void*, int64_t) = LONGLLAVA_PICK(int8_few_rows_task);
    Memory rows;
#if defined(LONGLLAVA_HAS_AMX)
    if (a.x_dtype == DTYPE_BFLOAT16 && a.rows >= 2 * a.experts && has_amx()) {
      plan.pitch = avx512amx::int8_few_rows_pitch(a);
      rows = memory((a.rows / 16 + a.experts) * plan.pitch * 2);
      plan.packed = rows.get();
      avx512amx::int8_few_rows_pack(&plan);
      task = avx512amx::int8_few_rows_task;
      step = INT8_FEW_TILED;
    }
#endif
    if (rows == nullptr && a.x_dtype == DTYPE_FLOAT32 && a.inputs % INT8_FEW_INPUTS == 0) {
      plan.quantised = const_cast<void*>(a.x);
      plan.pitch = a.x_row;
    } else if (rows == nullptr) {
      plan.pitch = int8_round_up(a.inputs, INT8_FEW_INPUTS);
      rows = memory(a.rows * plan.pitch * 4);
      plan.quantised = rows.get();
      LONGLLAVA_PICK(int8_few_rows_widen)(&plan);
    }
    plan.step_outputs = std::clamp<int64_t>(int8_round_up(ceil_div(a.outputs, 8 * threads), step), step, 64);
    plan.n_outputs_steps = ceil_div(a.outputs, plan.step_outputs);
    parallel_for(a.experts * plan.n_outputs_steps, threads, task, &plan);
  });
}
