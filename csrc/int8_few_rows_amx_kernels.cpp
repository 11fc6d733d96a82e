// Linear layers with int8 weights and few rows of bf16, by tiles (AMX): each weight is read once and becomes bf16,
// which holds it exactly; sums are fp32. A row's result is the same, however many others these are.
//
//   y^T (outputs, rows) = weight (outputs, inputs) x^T: 16 outputs are a tile's rows, as they lie in memory, 16 rows of
//   x its columns. Words of a tile hold the inputs i and i + 16 of 32, low and high.
//
// To widen 512 weights takes 48 cycles of two units, and to multiply them by 16 rows 16 of another meanwhile; measured
// are 60 and 35, one after the other.
#define LONGLLAVA_BF16
#include "amx.h"
#if defined(LONGLLAVA_AMX)
#include "int8_linear.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int TILE = 16;        // rows of a tile, and its words
constexpr int TILE_HALVES = 512;
constexpr int64_t STEP = 32;    // inputs of one product of tiles
constexpr int64_t RUN = 2;      // steps whose weights are widened together: a cache line of each output's
constexpr int64_t AHEAD = 512;  // bytes by which an output's weights are fetched ahead
constexpr int OUTPUTS = 2 * TILE;

struct Weights {
  alignas(64) uint16_t tiles[RUN][2][TILE_HALVES];

  uint32_t* row(int step, int output) {
    return reinterpret_cast<uint32_t*>(tiles[step][output / TILE] + output % TILE * STEP);
  }
};

LONGLLAVA_INLINE uvec float_bits(__m128i bytes) {
  return (uvec)(__m512i)_mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

// 32 weights as words; the upper half of a small whole number's fp32 is its bf16.
LONGLLAVA_INLINE uvec words(__m128i low, __m128i high) { return (float_bits(low) >> 16) | float_bits(high); }

// `n_inputs` weights, at most RUN * STEP, of each of `n_outputs` outputs, `pitch` bytes apart; what is missing is 0.
LONGLLAVA_INLINE void widen(const int8_t* weight, int64_t pitch, int n_outputs, int64_t n_inputs, Weights& to) {
  if (n_outputs == OUTPUTS && n_inputs == RUN * STEP) {
    for (int n = 0; n < OUTPUTS; ++n, weight += pitch) {
      const __m128i* from = reinterpret_cast<const __m128i*>(weight);
      _mm_prefetch(weight + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int step = 0; step < RUN; ++step)
        store(to.row(step, n), words(_mm_loadu_si128(from + 2 * step), _mm_loadu_si128(from + 2 * step + 1)));
    }
    return;
  }
  for (int n = 0; n < OUTPUTS; ++n)
    for (int step = 0; step < RUN; ++step) {
      const int64_t left = n < n_outputs ? n_inputs - step * STEP : 0;
      const __mmask32 there = left >= STEP ? ~__mmask32(0) : left > 0 ? (__mmask32(1) << left) - 1 : 0;
      const __m256i found = _mm256_maskz_loadu_epi8(there, weight + n * pitch + step * STEP);
      store(to.row(step, n), words(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1)));
    }
}

// x's rows [first, first + n_rows), at most 16, as the columns of tiles: [step][word][row].
void pack_rows(const Int8Arguments& a, int64_t first, int n_rows, uint16_t* to) {
  for (int64_t k = 0; k < a.inputs; k += STEP, to += TILE_HALVES) {
    const int64_t n = a.inputs - k < STEP ? a.inputs - k : STEP;
    const __mmask32 there = n == STEP ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
    vec square[TILE];
    for (int row = 0; row < TILE; ++row) {
      __m512i halves = _mm512_setzero_si512();
      if (row < n_rows)
        halves = _mm512_maskz_loadu_epi16(there, static_cast<const uint16_t*>(a.x) + (first + row) * a.x_row + k);
      const uvec low = (uvec)_mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
      const uvec high = (uvec)_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
      square[row] = bits<vec>(low | (high << 16));
    }
    transpose(square);
    for (int word = 0; word < TILE; ++word)
      store(reinterpret_cast<uint32_t*>(to + word * 2 * TILE), bits<uvec>(square[word]));
  }
}

// sums (2 tiles of outputs, `groups` of rows) += the products of `n_steps` steps; sums lie in the tiles 4 to 7.
template <int GROUPS>
LONGLLAVA_INLINE void multiply(const Weights& weights, int64_t n_steps, const uint16_t* x, int64_t group_halves) {
  memory_is_read();
  for (int64_t step = 0; step < n_steps; ++step, x += TILE_HALVES) {
    _tile_loadd(0, weights.tiles[step][0], 64);
    _tile_loadd(1, weights.tiles[step][1], 64);
    _tile_loadd(2, x, 64);
    _tile_dpbf16ps(4, 0, 2);
    _tile_dpbf16ps(5, 1, 2);
    if (GROUPS == 2) {
      _tile_loadd(3, x + group_halves, 64);
      _tile_dpbf16ps(6, 0, 3);
      _tile_dpbf16ps(7, 1, 3);
    }
  }
}

// y of 16 outputs and up to 16 rows.
void write(const Int8Arguments& a, float (*sums)[TILE], int64_t row, int n_rows, int64_t place, int64_t output,
           int n_outputs) {
  vec square[TILE];
  for (int n = 0; n < TILE; ++n) square[n] = load(sums[n]);
  transpose(square);
  const vec scale = load_some(a.scale + place, n_outputs);
  const vec bias = a.bias != nullptr ? load_some(a.bias + place, n_outputs) : vec{};
  for (int r = 0; r < n_rows; ++r) {
    const vec y = square[r] * scale + bias;
    const int64_t spot = (row + r) * a.outputs + output;
    if (a.y_dtype == DTYPE_FLOAT32) store_some(static_cast<float*>(a.y) + spot, y, n_outputs);
    else store_some(static_cast<uint16_t*>(a.y) + spot, y, n_outputs);
  }
}

// Up to 32 outputs of one or two groups of rows.
template <int GROUPS>
void block(const Int8Plan& plan, int64_t row, int64_t end, const uint16_t* x, int64_t place, int64_t output,
           int n_outputs) {
  const Int8Arguments& a = plan.args;
  Weights weights[2];
  _tile_zero(4);
  _tile_zero(5);
  if (GROUPS == 2) {
    _tile_zero(6);
    _tile_zero(7);
  }
  const int8_t* weight = a.weight + place * a.inputs;
  const auto inputs_left = [&](int64_t k) { return a.inputs - k < RUN * STEP ? a.inputs - k : RUN * STEP; };
  widen(weight, a.inputs, n_outputs, inputs_left(0), weights[0]);
  for (int64_t k = 0, run = 0; k < a.inputs; run ^= 1) {
    multiply<GROUPS>(weights[run], (inputs_left(k) + STEP - 1) / STEP, x + k * TILE, plan.pitch);
    k += RUN * STEP;  // the next are widened while tiles are multiplied
    if (k < a.inputs) widen(weight + k, a.inputs, n_outputs, inputs_left(k), weights[run ^ 1]);
  }
  alignas(64) float sums[4][TILE][TILE];
  _tile_stored(4, sums[0], 64);
  _tile_stored(5, sums[1], 64);
  if (GROUPS == 2) {
    _tile_stored(6, sums[2], 64);
    _tile_stored(7, sums[3], 64);
  }
  memory_is_read();
  for (int group = 0; group < GROUPS; ++group, row += TILE) {
    const int n_rows = end - row < TILE ? int(end - row) : TILE;
    for (int half = 0; half * TILE < n_outputs; ++half) {
      const int left = n_outputs - half * TILE;
      write(a, sums[2 * group + half], row, n_rows, place + half * TILE, output + half * TILE,
            left < TILE ? left : TILE);
    }
  }
}

// Where the packed rows of an expert begin: groups of 16 rows, none of two experts.
uint16_t* packed_rows(const Int8Plan& plan, int64_t expert, int64_t first_row) {
  return reinterpret_cast<uint16_t*>(plan.packed) + (first_row / TILE + expert) * plan.pitch;
}

struct Rows {
  int64_t begin, end;
};

Rows rows_of(const Int8Arguments& a, int64_t expert) {
  if (a.offsets == nullptr) return {0, a.rows};
  return {a.offsets[expert], a.offsets[expert + 1]};
}

}  // namespace

int64_t int8_few_rows_pitch(const Int8Arguments& a) { return int8_round_up(a.inputs, STEP) * TILE; }

void int8_few_rows_pack(void* opaque) {
  const Int8Plan& plan = *static_cast<const Int8Plan*>(opaque);
  for (int64_t expert = 0; expert < plan.args.experts; ++expert) {
    const Rows rows = rows_of(plan.args, expert);
    uint16_t* to = packed_rows(plan, expert, rows.begin);
    for (int64_t row = rows.begin; row < rows.end; row += TILE, to += plan.pitch)
      pack_rows(plan.args, row, int(rows.end - row < TILE ? rows.end - row : TILE), to);
  }
}

// A block of outputs of one expert, for all of its rows.
void int8_few_rows_task(void* opaque, int64_t task) {
  const Int8Plan& plan = *static_cast<const Int8Plan*>(opaque);
  const Int8Arguments& a = plan.args;
  const int64_t expert = task / plan.n_outputs_steps;
  const Rows rows = rows_of(a, expert);
  if (rows.begin >= rows.end) return;
  const TileRegisters registers;
  const int64_t first = task % plan.n_outputs_steps * plan.step_outputs;
  const int64_t last = first + plan.step_outputs < a.outputs ? first + plan.step_outputs : a.outputs;
  for (int64_t output = first; output < last; output += OUTPUTS) {
    const int n_outputs = last - output < OUTPUTS ? int(last - output) : OUTPUTS;
    const uint16_t* x = packed_rows(plan, expert, rows.begin);
    const int64_t place = expert * a.outputs + output;
    int64_t row = rows.begin;
    for (; row + TILE < rows.end; row += 2 * TILE, x += 2 * plan.pitch)
      block<2>(plan, row, rows.end, x, place, output, n_outputs);
    if (row < rows.end) block<1>(plan, row, rows.end, x, place, output, n_outputs);
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
LONGLLAVA_AMX_END
#endif
