// Small matrix products held in registers, in fp32 or in pairs of bf16.
#pragma once

#include "attention_tile.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// How products are taken. Those in registers have v as [t][channel].
struct InRegisters {
  static constexpr bool SCALES = true;  // scores come scaled
  struct Setup {};
  // From one t of v to the next; not a power of two, which would fill few sets of the cache.
  LONGLLAVA_INLINE int64_t v_stride(int64_t, int64_t v_width) { return round_up(v_width, 16) + 16; }
  LONGLLAVA_INLINE int64_t v_place(int64_t stride, int64_t t, int64_t d) { return t * stride + d; }
};

// fp32: one number of a and one vector of b at a time.
struct Single : InRegisters {
  typedef float Element;
  typedef vec Vector;
  static constexpr int DEPTH = 1;
  LONGLLAVA_INLINE int64_t depth(int64_t width) { return width; }  // of a row of q or k, in Elements
  LONGLLAVA_INLINE int64_t v_size(int64_t keys, int64_t v_width) { return keys * v_stride(keys, v_width); }
  LONGLLAVA_INLINE vec add_product(vec sum, float a, vec b) { return sum + splat(a) * b; }
  LONGLLAVA_INLINE vec part(vec b, int) { return b; }
  LONGLLAVA_INLINE vec part(float a, int) { return splat(a); }
  LONGLLAVA_INLINE vec join(const vec (&parts)[1]) { return parts[0]; }
  template <class Input>
  LONGLLAVA_INLINE float element(const Input* row, int64_t t, int64_t) {
    return load_one(row + t);
  }
  template <class Input>
  LONGLLAVA_INLINE void stage_keys(float* k, int64_t depth, const Input* source, int64_t source_stride, int64_t n,
                                   int64_t n_padded, int64_t width, const int32_t* ids) {
    stage_rows(k, depth, source, source_stride, n, n_padded, width, ids);
  }
  template <class Input>
  LONGLLAVA_INLINE bool stage_values(float* v, int64_t stride, const Input* source, int64_t source_stride, int64_t n,
                                     int64_t n_padded, int64_t width, const int32_t* ids) {
    return stage_rows(v, stride, source, source_stride, n, n_padded, width, ids);
  }
};

#if defined(LONGLLAVA_PAIRS)
// bf16: two numbers of a and two of b at a time, the first in the low half of 32 bits.
struct Pair : InRegisters {
  typedef uint32_t Element;
  typedef uvec Vector;
  static constexpr int DEPTH = 2;
  LONGLLAVA_INLINE int64_t depth(int64_t width) { return (width + 1) / 2; }
  LONGLLAVA_INLINE int64_t v_size(int64_t keys, int64_t v_width) { return keys / 2 * v_stride(keys, v_width); }

  LONGLLAVA_INLINE vec add_product(vec sum, uint32_t a, uvec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(a), (__m512bh)b);
  }
  LONGLLAVA_INLINE vec part(uvec b, int half) { return (vec)(half == 0 ? b << 16 : b & 0xffff0000u); }
  LONGLLAVA_INLINE vec part(uint32_t a, int half) { return part(splat(a), half); }

  // To nearest; ties go up, which p >= 0 meets once in 65,536 times.
  LONGLLAVA_INLINE uvec join(const vec (&parts)[2]) {
    return (((uvec)parts[0] + 0x8000u) >> 16) | (((uvec)parts[1] + 0x8000u) & 0xffff0000u);
  }
  LONGLLAVA_INLINE uint32_t word(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }
  LONGLLAVA_INLINE uint32_t element(const uint16_t* row, int64_t t, int64_t width) {
    return word(row[2 * t], 2 * t + 1 < width ? row[2 * t + 1] : 0);
  }
  LONGLLAVA_INLINE void stage_keys(uint32_t* k, int64_t depth, const uint16_t* source, int64_t source_stride, int64_t n,
                                   int64_t n_padded, int64_t width, const int32_t* ids) {
    for (int64_t i = 0; i < n_padded; ++i, source += source_stride, k += depth) {
      const bool wanted = i < n && (ids == nullptr || ids[i] >= 0);
      k[depth - 1] = 0;
      __builtin_memset(k, 0, wanted ? 0 : 4 * depth);
      __builtin_memcpy(k, source, wanted ? 2 * width : 0);
    }
  }
  // v[t][d] holds channel d of keys 2 t and 2 t + 1.
  LONGLLAVA_INLINE bool stage_values(uint32_t* v, int64_t stride, const uint16_t* source, int64_t source_stride,
                                     int64_t n, int64_t n_padded, int64_t width, const int32_t* ids) {
    bool finite = true;
    for (int64_t i = 0; i < n_padded; i += 2, v += stride) {
      const bool first = i < n && (ids == nullptr || ids[i] >= 0);
      const bool second = i + 1 < n && (ids == nullptr || ids[i + 1] >= 0);
      const uint16_t* low = source + i * source_stride;
      const uint16_t* high = low + source_stride;
      int64_t d = 0;
      if (first && second) {
        uvec spoiled{};
        for (; d + WIDTH <= width; d += WIDTH) {
          const uvec a = load_halves(low + d);
          const uvec b = load_halves(high + d);
          spoiled |= (uvec)((a & 0x7f80u) == 0x7f80u) | (uvec)((b & 0x7f80u) == 0x7f80u);
          store(v + d, a | b << 16);
        }
        for (int i = 0; i < WIDTH; ++i) finite = finite && spoiled[i] == 0;
      }
      for (; d < width; ++d) {
        v[d] = word(first ? low[d] : 0, second ? high[d] : 0);
        finite = finite && (v[d] & 0x7f80u) != 0x7f80u && (v[d] & 0x7f800000u) != 0x7f800000u;
      }
      for (; d < stride; ++d) v[d] = 0;
    }
    return finite;
  }
};
#endif

// sums[i][j] += a[i * a_row + t * a_step] * b[t * b_step + j's vector] over t < depth.
template <class Dot, int N>
LONGLLAVA_INLINE void add_products(vec (&sums)[TILE_HEIGHT][N], const typename Dot::Element* a, int64_t a_row,
                                   int64_t a_step, const typename Dot::Element* b, int64_t b_step, int64_t depth) {
  for (int64_t t = 0; t < depth; ++t, a += a_step, b += b_step) {
    typename Dot::Vector vectors[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) vectors[j] = load(b + j * WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_HEIGHT; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = Dot::add_product(sums[i][j], a[i * a_row], vectors[j]);
    }
  }
}

// One row's numbers to a lane, panel by panel: packed[panel][t][row]. Lanes beyond the rows are 0.
template <class Input, class Dot>
LONGLLAVA_INLINE void pack_rows(typename Dot::Element* packed, const void* rows, const AttentionStrides& strides,
                                const AttentionCall& call, const AttentionTask& task, const Panels& panels,
                                int64_t depth) {
  for (int64_t panel = 0; panel < panels.n_panels; ++panel) {
    const int64_t start = panels.start(panel) * WIDTH, n = panels.start(panel + 1) * WIDTH - start;
    typename Dot::Element* target = packed + start * depth;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = start + i;
      const Input* source = row < task.n_rows ? row_of<const Input>(rows, strides, call, task, row) : nullptr;
      for (int64_t t = 0; t < depth; ++t) target[t * n + i] = source != nullptr ? Dot::element(source, t, call.head_dim) : 0;
    }
  }
}

// scores[key][row] = scale * k . q
template <int N, class Dot>
LONGLLAVA_INLINE void score_keys(Dot, float* scores, const typename Dot::Element* k, int64_t k_stride,
                                 const typename Dot::Element* q_panel, int64_t depth, int64_t n_keys, float scale) {
  for (int64_t key = 0; key < n_keys; key += TILE_HEIGHT) {
    vec sums[TILE_HEIGHT][N] = {};
    add_products<Dot>(sums, k + key * k_stride, k_stride, 1, q_panel, N * WIDTH, depth);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_HEIGHT; ++i)
      for (int j = 0; j < N; ++j) store(scores + ((key + i) * N + j) * WIDTH, sums[i][j] * scale);
  }
}

// sums[d][row] = sums[d][row] * shrink[row] + sum over keys of v[key][d] p[key][row]; the sum over these keys is taken
// by itself, since one chain of 100,000 additions loses what is far smaller than its sum: y was off by up to 3e-4.
template <int N, class Dot>
LONGLLAVA_INLINE void add_values(Dot, float* sums_panel, int64_t width, const typename Dot::Element* v, int64_t v_stride,
                                 const typename Dot::Element* p, int64_t p_step, int64_t depth,
                                 const vec (&shrink)[N]) {
  for (int64_t d = 0; d < width; d += TILE_HEIGHT) {
    vec sums[TILE_HEIGHT][N] = {};
    add_products<Dot>(sums, v + d, 1, v_stride, p, p_step, depth);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_HEIGHT; ++i) {
      float* place = sums_panel + (d + i) * N * WIDTH;
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) store(place + j * WIDTH, load(place + j * WIDTH) * shrink[j] + sums[i][j]);
    }
  }
}

// The same where some v is NaN or infinite and some p is 0: a key that a row does not see adds nothing to it.
template <int N, class Dot>
LONGLLAVA_INLINE void add_values_seen(Dot, float* sums_panel, int64_t width, const typename Dot::Element* v,
                                      int64_t v_stride, const typename Dot::Element* p, int64_t p_step,
                                      int64_t depth, const vec (&shrink)[N]) {
  for (int64_t d = 0; d < width; ++d) {
    for (int j = 0; j < N; ++j) {
      float* place = sums_panel + (d * N + j) * WIDTH;
      vec sum{};
      for (int64_t t = 0; t < depth; ++t) {
        const typename Dot::Vector weight = load(p + t * p_step + j * WIDTH);
        for (int part = 0; part < Dot::DEPTH; ++part) {
          const vec one = Dot::part(weight, part);
          sum = one == 0.0f ? sum : sum + one * Dot::part(v[Dot::v_place(v_stride, t, d)], part);
        }
      }
      store(place, load(place) * shrink[j] + sum);
    }
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
