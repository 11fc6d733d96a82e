// How int8 products are taken, and how weights are packed for them. Include from *_kernels.cpp only.
//
// A step multiplies DEPTH inputs of one row by DEPTH inputs of each of a vector's outputs and adds to int32. Weights
// are packed [step][output][DEPTH], so that a vector of weights is one load.
#pragma once

#include "int8_linear.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace longllava {
namespace LONGLLAVA_FORM {

#if defined(LONGLLAVA_AMX)
constexpr int ROWS = 32, VECTORS = 2;  // four tiles of 16 rows x 16 outputs
#elif defined(__AVX512F__)
constexpr int ROWS = 12, VECTORS = 2;  // 24 of 32 registers
#else
constexpr int ROWS = 6, VECTORS = 2;  // 12 of 16
#endif
#if defined(LONGLLAVA_AMX)
constexpr int PADDING = 64;
constexpr int ROWS_TOGETHER = 96;  // that a panel of weights meets in turn: 6 KB of 192 inputs stay in the first cache
#else
constexpr int PADDING = 4;  // inputs that a row is filled up to with zeros
constexpr int FEWER_ROWS = 3;
#endif
constexpr int TILE_OUTPUTS = VECTORS * WIDTH;

// int16 in pairs: exact in every form, 2 x 128 x 128 fits easily.
struct Pairs {
  typedef int16_t Element;
  static constexpr int DEPTH = 2;
  static constexpr int32_t OFFSET = 0;

  LONGLLAVA_INLINE ivec add(ivec sum, ivec weights, ivec x) {
#if defined(__AVX512F__)
    return sum + (ivec)_mm512_madd_epi16((__m512i)weights, (__m512i)x);
#elif defined(__AVX2__)
    return sum + (ivec)_mm256_madd_epi16((__m256i)weights, (__m256i)x);
#elif defined(__SSE2__)
    return sum + (ivec)_mm_madd_epi16((__m128i)weights, (__m128i)x);
#else
    return sum + ((weights << 16) >> 16) * ((x << 16) >> 16) + (weights >> 16) * (x >> 16);
#endif
  }
  // WIDTH pairs of one output's weights; `n` of its inputs are there.
  LONGLLAVA_INLINE ivec weights(const int8_t* from, int64_t n) {
    int8_t some[2 * WIDTH] = {};
    if (n < 2 * WIDTH) {
      __builtin_memcpy(some, from, n);
      from = some;
    }
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    int16_t wide[2 * WIDTH];
    for (int i = 0; i < 2 * WIDTH; ++i) wide[i] = from[i];
    ivec out;
    __builtin_memcpy(&out, wide, sizeof out);
    return out;
#endif
  }
};

// int8 in fours. What VNNI multiplies are weights as unsigned numbers, 128 too large: 128 times the row's sum comes off
// at the end; sums are counted modulo 2^32, so that only the result has to fit. AMX takes them as they are.
struct Fours {
  typedef int8_t Element;
  static constexpr int DEPTH = 4;
#if defined(LONGLLAVA_AMX)
  static constexpr int32_t OFFSET = 0;
#else
  static constexpr int32_t OFFSET = 128;
#endif

  LONGLLAVA_INLINE ivec add(ivec sum, ivec weights, ivec x) {
#if defined(LONGLLAVA_VNNI)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#else
    uvec total = (uvec)sum;
    for (int shift = 0; shift < 32; shift += 8)
      total += (((uvec)weights >> shift) & 0xffu) * (uvec)((ivec)((uvec)x << (24 - shift)) >> 24);
    return (ivec)total;
#endif
  }
  LONGLLAVA_INLINE ivec weights(const int8_t* from, int64_t n) {
    uvec out{};
    if (n >= 4 * WIDTH) {
      __builtin_memcpy(&out, from, sizeof out);
    } else {
      int8_t some[4 * WIDTH] = {};
      __builtin_memcpy(some, from, n);
      __builtin_memcpy(&out, some, sizeof out);
    }
    return (ivec)(OFFSET == 0 ? out : out ^ 0x80808080u);
  }
};

// Weights of `n_outputs` outputs from `weight`, `n_inputs` of each: panels of TILE_OUTPUTS, square by square.
template <class Dot>
LONGLLAVA_INLINE void pack(const int8_t* weight, int64_t row, int64_t n_outputs, int64_t n_inputs,
                           typename Dot::Element* packed) {
  constexpr int across = WIDTH * Dot::DEPTH;  // inputs of a square
  const int64_t panel = int8_round_up(n_inputs, across) * TILE_OUTPUTS;
  for (int64_t n = 0; n < n_outputs; n += TILE_OUTPUTS, packed += panel)
    for (int64_t k = 0; k < n_inputs; k += across)
      for (int v = 0; v < VECTORS; ++v) {
        vec square[WIDTH];
        for (int i = 0; i < WIDTH; ++i) {
          const int64_t output = n + v * WIDTH + i;
          const int8_t* from = weight + output * row + k;
          square[i] = output < n_outputs ? bits<vec>(Dot::weights(from, n_inputs - k)) : vec{};
        }
        transpose(square);
        typename Dot::Element* to = packed + (k * TILE_OUTPUTS + v * across);
        for (int i = 0; i < WIDTH; ++i) __builtin_memcpy(to + i * TILE_OUTPUTS * Dot::DEPTH, &square[i], sizeof(vec));
      }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
