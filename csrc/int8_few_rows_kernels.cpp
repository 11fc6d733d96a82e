// Linear layers with int8 weights and few rows of floats: each weight is read once and widened in registers.
//
// OUTPUTS outputs and up to GROUP rows at a time: sums stay in registers, a vector of weights is used for each row.
#include "int8_linear.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int OUTPUTS = INT8_FEW_OUTPUTS;
#if defined(__AVX512F__)
constexpr int GROUP = 4;
#else
constexpr int GROUP = 2;
#endif

LONGLLAVA_INLINE vec widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vec x;
  for (int i = 0; i < WIDTH; ++i) x[i] = p[i];
  return x;
#endif
}

LONGLLAVA_INLINE vec widen_some(const int8_t* p, int64_t n) {
  int8_t some[WIDTH] = {};
  __builtin_memcpy(some, p, n);
  return widen(some);
}

// y[r][n] = scale * (x[r] . weight[n]) + bias for R rows (x_row floats apart) and N outputs.
template <int R, int N>
LONGLLAVA_INLINE void block(const Int8Arguments& a, const float* x, int64_t x_row, int64_t row, int64_t place,
                            int64_t output) {
  vec sums[R][N] = {};
  const int8_t* weight = a.weight + place * a.inputs;
  int64_t k = 0;
  for (; k + WIDTH <= a.inputs; k += WIDTH) {
    vec w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) w[n] = widen(weight + n * a.inputs + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vec one = load(x + r * x_row + k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] += w[n] * one;
    }
  }
  if (k < a.inputs)
    for (int n = 0; n < N; ++n) {
      const vec w = widen_some(weight + n * a.inputs + k, a.inputs - k);
      for (int r = 0; r < R; ++r) sums[r][n] += w * load(x + r * x_row + k);  // x is padded with zeros
    }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      float y = sum_lanes(sums[r][n]) * a.scale[place + n];
      if (a.bias != nullptr) y += a.bias[place + n];
      const int64_t spot = (row + r) * a.outputs + output + n;
      if (a.y_dtype == DTYPE_FLOAT32) static_cast<float*>(a.y)[spot] = y;
      else store_some(static_cast<uint16_t*>(a.y) + spot, splat(y), 1);
    }
}

template <int N>
LONGLLAVA_INLINE void outputs_of_rows(const Int8Plan& plan, int64_t begin, int64_t end, int64_t place, int64_t output) {
  const float* x = static_cast<const float*>(plan.quantised);
  int64_t row = begin;
  for (; row + GROUP <= end; row += GROUP)
    block<GROUP, N>(plan.args, x + row * plan.pitch, plan.pitch, row, place, output);
  for (; row < end; ++row) block<1, N>(plan.args, x + row * plan.pitch, plan.pitch, row, place, output);
}

}  // namespace

// The rows as fp32, padded with zeros.
void int8_few_rows_widen(void* opaque) {
  const Int8Plan& plan = *static_cast<const Int8Plan*>(opaque);
  const Int8Arguments& a = plan.args;
  for (int64_t row = 0; row < a.rows; ++row) {
    float* to = static_cast<float*>(plan.quantised) + row * plan.pitch;
    for (int64_t k = 0; k < plan.pitch; k += WIDTH) {
      const int64_t left = a.inputs - k, place = row * a.x_row + k;
      const int lanes = left < WIDTH ? int(left) : WIDTH;
      store(to + k, lanes <= 0                       ? vec{}
                    : a.x_dtype == DTYPE_BFLOAT16 ? load_some(static_cast<const uint16_t*>(a.x) + place, lanes)
                                                  : load_some(static_cast<const float*>(a.x) + place, lanes));
    }
  }
}

// A block of outputs of one expert, for all of its rows. plan.quantised holds the rows as fp32, padded with zeros.
void int8_few_rows_task(void* opaque, int64_t task) {
  const Int8Plan& plan = *static_cast<const Int8Plan*>(opaque);
  const Int8Arguments& a = plan.args;
  const int64_t expert = task / plan.n_outputs_steps;
  const int64_t begin = a.offsets != nullptr ? a.offsets[expert] : 0;
  const int64_t end = a.offsets != nullptr ? a.offsets[expert + 1] : a.rows;
  if (begin >= end) return;
  int64_t output = task % plan.n_outputs_steps * plan.step_outputs;
  const int64_t last = output + plan.step_outputs < a.outputs ? output + plan.step_outputs : a.outputs;
  for (; output + OUTPUTS <= last; output += OUTPUTS)
    outputs_of_rows<OUTPUTS>(plan, begin, end, expert * a.outputs + output, output);
  for (; output < last; ++output) outputs_of_rows<1>(plan, begin, end, expert * a.outputs + output, output);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
