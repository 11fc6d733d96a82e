// Vectors of WIDTH fp32 lanes, and the few functions the kernels need on them. Include from *_kernels.cpp only.
//
// GCC/Clang vector extensions: the same source becomes SSE2 or NEON (portable), AVX2 or AVX-512 by -m flags.
// Every function has internal linkage, so that no form's code can replace another's when linking.
#pragma once

#include <stdint.h>

#ifndef LONGLLAVA_WIDTH
#if defined(__AVX512F__)
#define LONGLLAVA_WIDTH 16
#elif defined(__AVX2__)
#define LONGLLAVA_WIDTH 8
#else
#define LONGLLAVA_WIDTH 4
#endif
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LONGLLAVA_INLINE static inline __attribute__((always_inline))

namespace longllava {

// Element types of the tensors that cross the C interface; the Python side holds the same numbers.
enum DType : int64_t { DTYPE_FLOAT32 = 0, DTYPE_BFLOAT16 = 1 };

namespace LONGLLAVA_FORM {

constexpr int WIDTH = LONGLLAVA_WIDTH;
constexpr float LOG2_E = 1.4426950408889634f;
typedef float vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t uvec __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t hvec __attribute__((vector_size(WIDTH * 2)));

LONGLLAVA_INLINE vec splat(float x) { return x - vec{}; }  // x + 0 would be an operation: -0 + 0 is 0
LONGLLAVA_INLINE ivec splat(int32_t x) { return x + ivec{}; }
LONGLLAVA_INLINE uvec splat(uint32_t x) { return x + uvec{}; }

template <class To, class From>
LONGLLAVA_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

LONGLLAVA_INLINE float bf16_to_float(uint16_t x) { return bits<float>(uint32_t(x) << 16); }

template <class Vector>
LONGLLAVA_INLINE Vector load_as(const void* p) {
  Vector x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

LONGLLAVA_INLINE uvec load_halves(const uint16_t* p) {  // 16 bits to the low half of 32
#if defined(__AVX512F__) && LONGLLAVA_WIDTH == 16
  return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && LONGLLAVA_WIDTH == 8  // GCC 12 makes four instructions of a __builtin_convertvector
  return (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(load_as<hvec>(p), uvec);
#endif
}

LONGLLAVA_INLINE vec load(const float* p) { return load_as<vec>(p); }
LONGLLAVA_INLINE ivec load(const int32_t* p) { return load_as<ivec>(p); }
LONGLLAVA_INLINE uvec load(const uint32_t* p) { return load_as<uvec>(p); }
LONGLLAVA_INLINE vec load(const uint16_t* p) { return bits<vec>(load_halves(p) << 16); }  // bfloat16

LONGLLAVA_INLINE void store(float* p, vec x) { __builtin_memcpy(p, &x, sizeof x); }
LONGLLAVA_INLINE void store(uint32_t* p, uvec x) { __builtin_memcpy(p, &x, sizeof x); }

// The upper halves are bfloat16: nearest, ties to even. NaN may become infinity.
LONGLLAVA_INLINE uvec nearest_halves(vec x) {
  const uvec u = bits<uvec>(x);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

LONGLLAVA_INLINE void store(uint16_t* p, vec x) {  // bfloat16; NaN stays NaN
#if defined(LONGLLAVA_BF16)  // one instruction; it takes what is below 2^-126 for 0
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const hvec y = __builtin_convertvector(x == x ? nearest_halves(x) >> 16 : (uvec{} + 0x7fc0u), hvec);
  __builtin_memcpy(p, &y, sizeof y);
#endif
}

// The first `lanes` < WIDTH elements only: nothing behind them is read or written; missing lanes are 0.
#if defined(__AVX512F__) && LONGLLAVA_WIDTH == 16
LONGLLAVA_INLINE __mmask16 first_lanes(int lanes) { return __mmask16((1u << lanes) - 1u); }
LONGLLAVA_INLINE vec load_some(const float* p, int lanes) {
  return (vec)_mm512_maskz_loadu_ps(first_lanes(lanes), p);
}
LONGLLAVA_INLINE vec load_some(const uint16_t* p, int lanes) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(lanes), p);
  return bits<vec>((uvec)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
}
LONGLLAVA_INLINE void store_some(float* p, vec x, int lanes) { _mm512_mask_storeu_ps(p, first_lanes(lanes), (__m512)x); }
LONGLLAVA_INLINE void store_some(uint16_t* p, vec x, int lanes) {
  uint16_t whole[WIDTH];
  store(whole, x);
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole));
  _mm256_mask_storeu_epi16(p, first_lanes(lanes), halves);
}
#else
template <class T>
LONGLLAVA_INLINE vec load_some(const T* p, int lanes) {
  T whole[WIDTH] = {};
  __builtin_memcpy(whole, p, lanes * sizeof(T));
  return load(whole);
}

template <class T>
LONGLLAVA_INLINE void store_some(T* p, vec x, int lanes) {
  T whole[WIDTH];
  store(whole, x);
  __builtin_memcpy(p, whole, lanes * sizeof(T));
}
#endif

// b where either is NaN, as the processor's own instruction has it; GCC 12 makes a comparison and a choice of it at times.
#if defined(__AVX512F__) && LONGLLAVA_WIDTH == 16  // unmasked, GCC 12 warns in its own header
LONGLLAVA_INLINE vec maximum(vec a, vec b) { return (vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
LONGLLAVA_INLINE vec minimum(vec a, vec b) { return (vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX2__) && LONGLLAVA_WIDTH == 8
LONGLLAVA_INLINE vec maximum(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
LONGLLAVA_INLINE vec minimum(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
LONGLLAVA_INLINE vec maximum(vec a, vec b) { return a > b ? a : b; }
LONGLLAVA_INLINE vec minimum(vec a, vec b) { return a < b ? a : b; }
#endif
LONGLLAVA_INLINE vec absolute(vec x) { return bits<vec>(bits<uvec>(x) & 0x7fffffffu); }

// Sums over all tokens are taken in runs of so many terms, and the runs added by themselves. 100,000 tokens are some
// 6,000 terms, sums of chunks or rows: as one chain of additions they were off by 5 to 35 times as much as torch's.
constexpr int64_t SUM_RUN = 64;

template <class T>
LONGLLAVA_INLINE void end_run(T* __restrict run, T* __restrict total, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] += run[i];
    run[i] = T{};
  }
}

LONGLLAVA_INLINE float sum_lanes(vec x) {
  float lane[WIDTH];
  store(lane, x);
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

LONGLLAVA_INLINE bool all_below(vec x, float bound) {
#if defined(__AVX2__) && LONGLLAVA_WIDTH == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(bound), _CMP_LT_OQ)) == 0xff;
#else
  bool all = true;
  for (int i = 0; i < WIDTH; ++i) all &= x[i] < bound;
  return all;
#endif
}

// low = a0 b0 a1 b1 ...; high = the same of the upper halves
LONGLLAVA_INLINE void zip(vec a, vec b, vec& low, vec& high) {
  ivec from_low, from_high;
  for (int i = 0; i < WIDTH; ++i) {
    from_low[i] = i / 2 + i % 2 * WIDTH;
    from_high[i] = from_low[i] + WIDTH / 2;
  }
#if defined(__clang__)
  float both[2 * WIDTH];
  store(both, a);
  store(both + WIDTH, b);
  for (int i = 0; i < WIDTH; ++i) low[i] = both[from_low[i]], high[i] = both[from_high[i]];
#else
  low = __builtin_shuffle(a, b, from_low);
  high = __builtin_shuffle(a, b, from_high);
#endif
}

// A WIDTH x WIDTH square, in place: log2(WIDTH) perfect shuffles of the rows.
LONGLLAVA_INLINE void transpose(vec (&rows)[WIDTH]) {
#pragma GCC unroll 4
  for (int round = 1; round < WIDTH; round *= 2) {
    vec next[WIDTH];
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH / 2; ++i) zip(rows[i], rows[i + WIDTH / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) rows[i] = next[i];
  }
}

// Lane i of the result: the sum over the lanes of rows[i], in the order of sum_lanes.
LONGLLAVA_INLINE vec sums_of_rows(const vec* rows) {
  vec sum[WIDTH];
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) sum[i] = rows[i];
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      vec low, high;
      zip(sum[i], sum[i + half], low, high);
      sum[i] = low + high;
    }
  return sum[0];
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
