// Vectors of floats as wide as the form's registers, and the few operations attention needs on them.
//
// GCC's and Clang's vector types carry the arithmetic; intrinsics stand only where the compiler has no word.
// Everything is inlined: vectors never cross a function call.
#pragma once

#include <stdint.h>

#include "isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LONGLLAVA_INLINE static inline __attribute__((always_inline))

namespace longllava {
namespace LONGLLAVA_FORM {

// LANES floats make a vector. A product of matrices holds TILE_HEIGHT x TILE_VECTORS of them in registers:
// 12 of AVX2's 16, 24 of AVX-512's 32, 8 of SSE's 16.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_HEIGHT = 8, TILE_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_HEIGHT = 4, TILE_VECTORS = 3;
#else
constexpr int LANES = 4, TILE_HEIGHT = 4, TILE_VECTORS = 2;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr float NEGATIVE_INFINITY = -__builtin_inff();

template <class Vector, class Element>
LONGLLAVA_INLINE Vector load_as(const Element* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}
LONGLLAVA_INLINE Vec load(const float* source) { return load_as<Vec>(source); }
template <class Vector, class Element>
LONGLLAVA_INLINE void store(Element* target, Vector value) {
  __builtin_memcpy(target, &value, sizeof value);
}
LONGLLAVA_INLINE Vec broadcast(float value) { return value - Vec{}; }  // x - 0 is x, for -0 too
LONGLLAVA_INLINE Int broadcast(int32_t value) { return value + Int{}; }
LONGLLAVA_INLINE Bits broadcast(uint32_t value) { return value + Bits{}; }

// The second operand when either is NaN, as the processor's own instruction does.
LONGLLAVA_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // unmasked, GCC 12 warns in its own header
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

LONGLLAVA_INLINE float sum_of_lanes(Vec value) {
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The sums of four vectors' lanes, to `target`.
LONGLLAVA_INLINE void store_sums_of_lanes(float* target, const Vec (&values)[4]) {
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
  for (int i = 0; i < 4; ++i) target[i] = sum_of_lanes(values[i]);
#endif
}

// 2^x for x <= ~120, relative error 2e-7; exactly 0 below -127 and for -infinity; NaN stays NaN.
// x = n + f with |f| <= 1/2: adding 1.5 * 2^23 + 127 leaves n + 127, the exponent's bits, in the lowest places.
// The polynomial is the one of degree 5 nearest to 2^f on [-1/2, 1/2] (relative error) that is 1 at 0.
LONGLLAVA_INLINE Vec exp2_of(Vec x) {
  constexpr float magic = 12582912.0f + 127.0f;
  x = maximum(broadcast(-127.0f), x);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec power = broadcast(0.00132647052f);
  power = power * f + 0.0096715102f;
  power = power * f + 0.0555073395f;
  power = power * f + 0.240222424f;
  power = power * f + 0.693147004f;
  power = power * f + 1.0f;
  return power * (Vec)((Bits)shifted << 23);
}

LONGLLAVA_INLINE Bits load_halves(const uint16_t* source) {  // 16 bits to the low half of 32
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__AVX2__)  // GCC 12 makes four instructions of a __builtin_convertvector
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  return __builtin_convertvector(load_as<Halves>(source), Bits);
#endif
}
LONGLLAVA_INLINE Vec widen(const uint16_t* source) { return (Vec)(load_halves(source) << 16); }  // bf16 to fp32
LONGLLAVA_INLINE float widen_one(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
LONGLLAVA_INLINE uint16_t narrow_one(float value) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One loader for both types of input.
LONGLLAVA_INLINE Vec load_wide(const float* source) { return load(source); }
LONGLLAVA_INLINE Vec load_wide(const uint16_t* source) { return widen(source); }
LONGLLAVA_INLINE float load_one(const float* source) { return *source; }
LONGLLAVA_INLINE float load_one(const uint16_t* source) { return widen_one(*source); }
LONGLLAVA_INLINE void store_one(float* target, float value) { *target = value; }
LONGLLAVA_INLINE void store_one(uint16_t* target, float value) { *target = narrow_one(value); }

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
