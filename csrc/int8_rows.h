// Rows of floats to int8 by the rule of longllava/ops/quantized.py: absmax / 127, to the nearest, ties to even; rows of
// zeros (below 2^-100) have scale 1, rows with NaN or infinity scale NaN and values 0. Include from *_kernels.cpp only.
#pragma once

#include "int8_linear.h"

namespace longllava {
namespace LONGLLAVA_FORM {

LONGLLAVA_INLINE ivec larger(ivec a, ivec b) {
#if defined(__AVX512F__)
  return (ivec)_mm512_maskz_max_epi32(0xffff, (__m512i)a, (__m512i)b);  // unmasked, GCC 12 warns in its own header
#elif defined(__AVX2__)
  return (ivec)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

// Lane i of row r is i ^ 2^r. Written out: GCC 12 puts lanes that it has to compute into a vector one by one.
alignas(64) static const int32_t OTHER_HALF[4][16] = {
    {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14},
    {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
    {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
    {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}};

// Halves of a vector are folded onto each other until one lane is left.
template <class Fold>
LONGLLAVA_INLINE int32_t fold_lanes(ivec x, Fold fold) {
#pragma GCC unroll 4
  for (int round = WIDTH == 16 ? 3 : WIDTH == 8 ? 2 : 1; round >= 0; --round) {
#if defined(__clang__)
    ivec moved = x;
    for (int i = 0; i < 1 << round; ++i) moved[i] = x[i + (1 << round)];
#else
    const ivec moved = __builtin_shuffle(x, load(OTHER_HALF[round]));
#endif
    x = fold(x, moved);
  }
  return x[0];
}

// |x| as bits, integers of the same order with NaN above infinity: a maximum loses neither.
LONGLLAVA_INLINE uint32_t largest_bits(const float* x, int64_t n) {
  ivec most[4] = {};
  int64_t k = 0;
  for (; k + 4 * WIDTH <= n; k += 4 * WIDTH)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = larger(most[i], bits<ivec>(load(x + k + i * WIDTH)) & 0x7fffffff);
  for (; k + WIDTH <= n; k += WIDTH) most[0] = larger(most[0], bits<ivec>(load(x + k)) & 0x7fffffff);
  if (k < n) most[0] = larger(most[0], bits<ivec>(load_some(x + k, int(n - k))) & 0x7fffffff);
  const ivec all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  return uint32_t(fold_lanes(all, [](ivec a, ivec b) { return larger(a, b); }));
}

// The same of bf16, two to a lane.
LONGLLAVA_INLINE uint32_t largest_bits(const uint16_t* x, int64_t n) {
  typedef int16_t pairs __attribute__((vector_size(WIDTH * 4)));
  pairs most[2] = {};
  int64_t k = 0;
  for (; k + 4 * WIDTH <= n; k += 4 * WIDTH)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const pairs size = load_as<pairs>(x + k + 2 * i * WIDTH) & int16_t(0x7fff);
      most[i] = size > most[i] ? size : most[i];
    }
  const pairs more = most[0] > most[1] ? most[0] : most[1];
  ivec all = larger((ivec)((uvec)more << 16), (ivec)more & int32_t(0x7fff0000));
  for (; k < n; k += WIDTH) {
    const vec some = k + WIDTH <= n ? load(x + k) : load_some(x + k, int(n - k));
    all = larger(all, bits<ivec>(some) & 0x7fffffff);
  }
  return uint32_t(fold_lanes(all, [](ivec a, ivec b) { return larger(a, b); }));
}

struct RowScale {
  float scale, factor;  // values are factor times x; 0 where nothing is seen
};

LONGLLAVA_INLINE RowScale scale_of(uint32_t largest) {
  if (largest >= 0x7f800000u) return {__builtin_nanf(""), 0.0f};
  const float absmax = bits<float>(largest);
  if (absmax < 0x1p-100f) return {1.0f, 0.0f};
  return {absmax / 127.0f, 127.0f / absmax};
}

// To the nearest integer, ties to even; with CLAMP within -127 .. 127, where a row's largest number alone does not see
// to that.
template <bool CLAMP>
LONGLLAVA_INLINE ivec nearest(vec x, float factor) {
  vec scaled = x * factor;
  if (CLAMP) scaled = minimum(splat(127.0f), maximum(splat(-127.0f), scaled));
#if defined(__AVX512F__)
  return (ivec)_mm512_maskz_cvtps_epi32(0xffff, (__m512)scaled);
#elif defined(__AVX2__)
  return (ivec)_mm256_cvtps_epi32((__m256)scaled);
#else
  return bits<ivec>(scaled + splat(12582912.0f)) - 0x4b400000;  // 1.5 * 2^23 more leaves it in the lowest bits
#endif
}

LONGLLAVA_INLINE void narrow(int8_t* out, ivec values) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)values));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)values), high = _mm256_extracti128_si256((__m256i)values, 1);
  const __m128i halves = _mm_packs_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(halves, halves));
#else
  for (int i = 0; i < WIDTH; ++i) out[i] = int8_t(values[i]);
#endif
}

LONGLLAVA_INLINE void narrow(int16_t* out, ivec values) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)values));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)values), high = _mm256_extracti128_si256((__m256i)values, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packs_epi32(low, high));
#else
  for (int i = 0; i < WIDTH; ++i) out[i] = int16_t(values[i]);
#endif
}

// Four vectors, one after another: half the operations of one at a time.
LONGLLAVA_INLINE void narrow(int8_t* out, const ivec (&values)[4]) {
#if defined(__AVX512BW__)  // bytes lie in their 128 bits of each vector in turn
  const __m512i low = _mm512_packs_epi32((__m512i)values[0], (__m512i)values[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)values[2], (__m512i)values[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packs_epi16(low, high));
  _mm512_storeu_si512(out, bytes);
#elif defined(__AVX2__)
  const __m256i low = _mm256_packs_epi32((__m256i)values[0], (__m256i)values[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)values[2], (__m256i)values[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
#else
  for (int i = 0; i < 4; ++i) narrow(out + i * WIDTH, values[i]);
#endif
}

LONGLLAVA_INLINE void narrow(int16_t* out, const ivec (&values)[4]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (int i = 0; i < 4; i += 2) {
    const __m256i mixed = _mm256_packs_epi32((__m256i)values[i], (__m256i)values[i + 1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * WIDTH), _mm256_permute4x64_epi64(mixed, 0xd8));
  }
#else
  for (int i = 0; i < 4; ++i) narrow(out + i * WIDTH, values[i]);
#endif
}

// Columns k .. k + lanes - 1 of pieces of a row that lie `pitch` numbers apart, four by four: sums and differences.
template <bool FIRST, class T>
LONGLLAVA_INLINE void rotate_four(const T* x, float* out, int64_t pitch, int lanes) {
  vec a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = lanes == WIDTH ? load(x + i * pitch) : load_some(x + i * pitch, lanes);
    if (FIRST) a[i] *= 0.25f;
  }
  const vec sums[4] = {a[0] + a[1], a[0] - a[1], a[2] + a[3], a[2] - a[3]};
  const vec y[4] = {sums[0] + sums[2], sums[1] + sums[3], sums[0] - sums[2], sums[1] - sums[3]};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) lanes == WIDTH ? store(out + i * pitch, y[i]) : store_some(out + i * pitch, y[i], lanes);
}

// The rows of quantized.py's `rotate`; out may be x. n is a multiple of 16.
template <class T>
LONGLLAVA_INLINE void rotate_row(const T* x, int64_t n, float* out) {
  const int64_t piece = n / 16;
  for (int64_t k = 0; k < piece; k += WIDTH) {
    const int lanes = piece - k < WIDTH ? int(piece - k) : WIDTH;
    for (int64_t i = 0; i < 16; i += 4) rotate_four<true>(x + i * piece + k, out + i * piece + k, piece, lanes);
    for (int64_t i = 0; i < 4; ++i)
      rotate_four<false>(static_cast<const float*>(out) + i * piece + k, out + i * piece + k, 4 * piece, lanes);
  }
}

// One row whose factor is known; with SUM returns the sum of its values.
template <bool SUM, bool CLAMP, class T, class Out>
LONGLLAVA_INLINE int32_t round_row(const T* x, int64_t n, float factor, Out* out) {
  ivec sum{};
  int64_t k = 0;
  for (; k + 4 * WIDTH <= n; k += 4 * WIDTH) {
    ivec values[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) values[i] = nearest<CLAMP>(load(x + k + i * WIDTH), factor);
    if (SUM) sum += (values[0] + values[1]) + (values[2] + values[3]);
    narrow(out + k, values);
  }
  for (; k < n; k += WIDTH) {
    const int lanes = n - k < WIDTH ? int(n - k) : WIDTH;
    const ivec values = nearest<CLAMP>(lanes == WIDTH ? load(x + k) : load_some(x + k, lanes), factor);
    if (SUM) sum += values;
    Out some[WIDTH];
    narrow(some, values);
    __builtin_memcpy(out + k, some, lanes * sizeof(Out));
  }
  return SUM ? fold_lanes(sum, [](ivec a, ivec b) { return a + b; }) : 0;
}

// One row of floats; with SUM returns the sum of its values. Out is int8_t or int16_t.
template <bool SUM, class T, class Out>
LONGLLAVA_INLINE int32_t quantise_row(const T* x, int64_t n, const float* absmax, Out* out, float* scale) {
  const uint32_t largest = absmax != nullptr ? bits<uint32_t>(*absmax) & 0x7fffffffu : largest_bits(x, n);
  const RowScale row = scale_of(largest);
  *scale = row.scale;
  if (row.factor == 0.0f) {
    if (n > 0) __builtin_memset(out, 0, n * sizeof(Out));  // an empty row may have no address
    return 0;
  }
  return absmax != nullptr ? round_row<SUM, true>(x, n, row.factor, out) : round_row<SUM, false>(x, n, row.factor, out);
}

template <bool SUM, class Out>
LONGLLAVA_INLINE int32_t copy_row(const int8_t* x, int64_t n, Out* out) {
  if (!SUM && sizeof(Out) == 1) {
    __builtin_memcpy(out, x, n);
    return 0;
  }
  int32_t total = 0;
  for (int64_t k = 0; k < n; ++k) {
    out[k] = x[k];
    total += x[k];
  }
  return total;
}

// Row `row` of x, quantised if it is not yet; with SUM returns the sum of its values.
template <bool SUM, class Out>
LONGLLAVA_INLINE int32_t prepare_row(const Int8Arguments& a, int64_t row, Out* out, float* scale) {
  const float* absmax = a.absmax != nullptr ? a.absmax + row : nullptr;
  if (a.x_dtype == DTYPE_INT8) {
    *scale = a.x_scale[row];
    return copy_row<SUM>(static_cast<const int8_t*>(a.x) + row * a.x_row, a.inputs, out);
  }
  if (a.x_dtype == DTYPE_FLOAT32)
    return quantise_row<SUM>(static_cast<const float*>(a.x) + row * a.x_row, a.inputs, absmax, out, scale);
  return quantise_row<SUM>(static_cast<const uint16_t*>(a.x) + row * a.x_row, a.inputs, absmax, out, scale);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
