// Exponentials and what is made of them, on vectors of fp32 lanes. Include from *_kernels.cpp only.
#pragma once

#include "vector.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// x[k] = 2^(factor x[k]) by a polynomial of degree 5; relative error 2.3e-7, and exactly 1 at 0, so that a step of
// length 0 keeps the state as it is. Beside 0 errors lie as often above as below: a long-lived state takes a factor
// just below 1 thousands of times. With CLAMP any finite product; without it |factor x| <= 126. K vectors go in step,
// each waiting for the others instead of for its own chain of dependent operations.
#define EACH _Pragma("GCC unroll 8") for (int k = 0; k < K; ++k)
#if defined(__AVX512F__) && LONGLLAVA_WIDTH == 16
constexpr bool EXP2_SATURATES = true;
// The polynomial takes y - floor(y), in [0, 1), and the instruction that scales takes floor(y) from y itself: eight
// operations. It saturates, so that nothing is clamped. y is the product plus 1/4, and the polynomial 2^(f - 1/4).
// Without that shift what is just below 0 has a fraction just below 1, which is cut to a multiple of 2^-24, and where
// the polynomial's own error is not 0: all decays of long-lived states came out 1.6e-7 too small.
template <bool CLAMP, int K>
LONGLLAVA_INLINE void exp2_together(vec (&x)[K], vec factor) {
  vec f[K], p[K];
  EACH x[k] = x[k] * factor + 0.25f;
  EACH f[k] = (vec)_mm512_reduce_ps((__m512)x[k], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  EACH p[k] = splat(0.00156535953f) * f[k] + 0.00759780779f;
  EACH p[k] = p[k] * f[k] + 0.0469061621f;
  EACH p[k] = p[k] * f[k] + 0.201958686f;
  EACH p[k] = p[k] * f[k] + 0.582868397f;
  EACH p[k] = p[k] * f[k] + 0.840896368f;
  EACH x[k] = (vec)_mm512_scalef_ps((__m512)p[k], (__m512)x[k]);
}
#else
constexpr bool EXP2_SATURATES = false;

// The polynomial takes what is left of the product beside the nearest whole number, in [-1/2, 1/2].
template <bool CLAMP, int K>
LONGLLAVA_INLINE void exp2_together(vec (&x)[K], vec factor) {
  vec f[K], p[K], shifted[K];
  EACH x[k] *= factor;
  if (CLAMP) EACH x[k] = minimum(splat(126.0f), maximum(splat(-126.0f), x[k]));
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  EACH shifted[k] = x[k] + magic;
  EACH f[k] = x[k] - (shifted[k] - magic);
  EACH p[k] = splat(0.0013333538f) * f[k] + 0.0096662454f;
  EACH p[k] = p[k] * f[k] + 0.0555050038f;
  EACH p[k] = p[k] * f[k] + 0.2402235121f;
  EACH p[k] = p[k] * f[k] + 0.6931471229f;
  EACH p[k] = p[k] * f[k] + 1.0f;
  // Unsigned: lanes that nobody reads may hold a NaN with a payload, which this addition turns over. A NaN that
  // arithmetic has made has none in its lowest bits, and stays.
  EACH x[k] = bits<vec>(bits<uvec>(p[k]) + (bits<uvec>(shifted[k]) << 23));
}
#endif

constexpr float EXP_MOST = 87.0f;  // e^87 = 2^125.5, so that 1 + e^x has a reciprocal in every form

// x[k] = e^(sign x[k]), at most e^EXP_MOST; NaN stays.
template <int K>
LONGLLAVA_INLINE void exp_together(vec (&x)[K], float sign = 1.0f) {
  if (!EXP2_SATURATES || sign < 0) EACH x[k] = maximum(splat(-EXP_MOST), x[k]);
  if (!EXP2_SATURATES || sign > 0) EACH x[k] = minimum(splat(EXP_MOST), x[k]);
  exp2_together<false>(x, splat(sign * LOG2_E));
}

LONGLLAVA_INLINE vec exp_vec(vec x) {
  vec one[1] = {x};
  exp_together(one);
  return one[0];
}

// 1 / x to 2e-7 for 2^-126 < x; 0 above 2^126. A division occupies its unit for many cycles.
LONGLLAVA_INLINE vec reciprocal(vec x) {
#if defined(__AVX512F__) && LONGLLAVA_WIDTH == 16
  const vec r = (vec)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__) && LONGLLAVA_WIDTH == 8
  const vec r = (vec)_mm256_rcp_ps((__m256)x);
#else
  const vec r = 1.0f / x;
#endif
  return r * (2.0f - x * r);
}

template <int K>
LONGLLAVA_INLINE void sigmoid_together(vec (&x)[K]) {
  exp_together(x, -1.0f);
  EACH x[k] = reciprocal(1.0f + x[k]);
}

LONGLLAVA_INLINE vec sigmoid(vec x) {
  vec one[1] = {x};
  sigmoid_together(one);
  return one[0];
}

// Derivative of silu(x) = x sigmoid(x). 1 - sigmoid(x) is computed as such: by subtraction, x = 3e4 would magnify the
// last bit of sigmoid(x) to 2e-3.
LONGLLAVA_INLINE vec silu_slope(vec x) {
  const vec e = exp_vec(-x), gate = reciprocal(1.0f + e);
  return gate * (1.0f + x * (e * gate));
}

// x[k] = log(1 + e^x[k]) = max(x, 0) + log1p(e), with e = e^-|x| and log1p(e) / e as a polynomial of degree 8 that
// is minimax on [0, 1]; relative error 2e-7. Above 17 that is x itself, as in torch above 20.
template <int K>
LONGLLAVA_INLINE void softplus_together(vec (&x)[K]) {
  vec e[K], p[K];
  EACH e[k] = absolute(x[k]);
  if (!EXP2_SATURATES) EACH e[k] = minimum(splat(EXP_MOST), e[k]);
  exp2_together<false>(e, splat(-LOG2_E));
  EACH p[k] = splat(0.005232699341f) * e[k] - 0.02950525518f;
  EACH p[k] = p[k] * e[k] + 0.07822597114f;
  EACH p[k] = p[k] * e[k] - 0.136632467f;
  EACH p[k] = p[k] * e[k] + 0.191060068f;
  EACH p[k] = p[k] * e[k] - 0.2484298212f;
  EACH p[k] = p[k] * e[k] + 0.3331909678f;
  EACH p[k] = p[k] * e[k] - 0.4999949314f;
  EACH p[k] = p[k] * e[k] + 0.9999999699f;
  EACH x[k] = maximum(vec{}, x[k]) + e[k] * p[k];
}

template <int K>
LONGLLAVA_INLINE void silu_together(vec (&x)[K]) {
  vec gate[K];
  EACH gate[k] = x[k];
  sigmoid_together(gate);
  EACH x[k] *= gate[k];
}
#undef EACH

// A function of K vectors in step, over n of them in place: as many at a time as registers hold, the last ones alone.
template <class F>
LONGLLAVA_INLINE void in_step(vec* x, int n, F f) {
  constexpr int K = WIDTH == 16 ? 8 : 4;
  int t = 0;
  for (; t + K <= n; t += K) {
    vec some[K];
    for (int k = 0; k < K; ++k) some[k] = x[t + k];
    f(some);
    for (int k = 0; k < K; ++k) x[t + k] = some[k];
  }
  for (; t < n; ++t) {
    vec one[1] = {x[t]};
    f(one);
    x[t] = one[0];
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
