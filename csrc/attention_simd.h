// What attention needs of vectors beyond vector.h: the tile of its products, its exponential, single numbers.
#pragma once

#include "vector.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// A product of matrices holds TILE_HEIGHT x TILE_VECTORS vectors in registers: 12 of AVX2's 16, 24 of AVX-512's 32, 8 of
// SSE's 16.
#if defined(LONGLLAVA_AMX)  // AMX holds them in four tiles of 16 rows x 16 columns: attention_amx_kernels.cpp
constexpr int TILE_HEIGHT = 32, TILE_VECTORS = 2;
#elif defined(__AVX512F__)
constexpr int TILE_HEIGHT = 8, TILE_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int TILE_HEIGHT = 4, TILE_VECTORS = 3;
#else
constexpr int TILE_HEIGHT = 4, TILE_VECTORS = 2;
#endif

constexpr float NEGATIVE_INFINITY = -__builtin_inff();

// The sums of four vectors' lanes, to `target`.
LONGLLAVA_INLINE void store_sums_of_lanes(float* target, const vec (&values)[4]) {
#if defined(__AVX2__)
  __m256 halves[4];
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    halves[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)values[i]), _mm512_extractf32x8_ps((__m512)values[i], 1));
#else
    halves[i] = (__m256)values[i];
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
  _mm_storeu_ps(target, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int i = 0; i < 4; ++i) target[i] = sum_lanes(values[i]);
#endif
}

// 2^x for x <= ~120, relative error 2e-7; exactly 0 below -127 and for -infinity; NaN stays NaN.
#if defined(__AVX512F__)
// As exp2_together (vector_math.h) but for the shift, as no error adds up here. What would be denormal, which costs
// hundreds of cycles, is left out.
LONGLLAVA_INLINE vec exp2_of(vec x) {
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.0f), _CMP_NLT_UQ);
  const vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vec power = splat(0.00186928f) * f + 0.00900735f;
  power = power * f + 0.0558121f;
  power = power * f + 0.2401589f;
  power = power * f + 0.69315207f;
  power = power * f + 1.0f;
  return (vec)_mm512_maskz_scalef_ps(normal, (__m512)power, (__m512)x);
}
#else
// x = n + f with |f| <= 1/2: adding 1.5 * 2^23 + 127 leaves n + 127, the exponent's bits, in the lowest places.
// The polynomial is the one of degree 5 nearest to 2^f on [-1/2, 1/2] (relative error) that is 1 at 0.
LONGLLAVA_INLINE vec exp2_of(vec x) {
  constexpr float magic = 12582912.0f + 127.0f;
  x = maximum(splat(-127.0f), x);
  const vec shifted = x + magic;
  const vec f = x - (shifted - magic);
  vec power = splat(0.00132647052f);
  power = power * f + 0.0096715102f;
  power = power * f + 0.0555073395f;
  power = power * f + 0.240222424f;
  power = power * f + 0.693147004f;
  power = power * f + 1.0f;
  return power * (vec)((uvec)shifted << 23);
}
#endif

LONGLLAVA_INLINE uint16_t float_to_bf16(float value) {  // to nearest, ties to even
  const uint32_t whole = bits<uint32_t>(value);
  if ((whole & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((whole >> 16) | 0x40u);  // NaN
  return static_cast<uint16_t>((whole + 0x7fffu + ((whole >> 16) & 1u)) >> 16);
}

// One number of either type of input.
LONGLLAVA_INLINE float load_one(const float* source) { return *source; }
LONGLLAVA_INLINE float load_one(const uint16_t* source) { return bf16_to_float(*source); }
LONGLLAVA_INLINE void store_one(float* target, float value) { *target = value; }
LONGLLAVA_INLINE void store_one(uint16_t* target, float value) { *target = float_to_bf16(value); }

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
