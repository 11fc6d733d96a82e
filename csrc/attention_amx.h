// Products in tiles of bf16 (AMX: Sapphire Rapids and later), summed in fp32. Include from attention*_amx_kernels.cpp
// only, which say what the compiler may use.
//
// Pairs of bf16 side by side in a word are what a tile instruction takes of its right operand: q and p have the same
// form as in attention_bf16_kernels.cpp (Pair); k has it as rows, and v is transposed.
#pragma once

#include "amx.h"
#include "attention_products.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// Words are in sixteens: 32 channels of a row of q or k, 32 keys of a channel of v. What is missing is 0.
struct Tiles : Pair {
  static constexpr bool SCALES = false;  // the softmax does
  typedef TileRegisters Setup;
  LONGLLAVA_INLINE int64_t depth(int64_t width) { return round_up(width, 32) / 2; }
  LONGLLAVA_INLINE int64_t v_stride(int64_t keys, int64_t) { return keys / 2 + 16; }  // an odd number of cache lines
  LONGLLAVA_INLINE int64_t v_size(int64_t keys, int64_t v_width) { return v_width * v_stride(keys, v_width); }
  LONGLLAVA_INLINE int64_t v_place(int64_t stride, int64_t t, int64_t d) { return d * stride + t; }

  LONGLLAVA_INLINE uint32_t element(const uint16_t* row, int64_t t, int64_t width) {
    return 2 * t < width ? Pair::element(row, t, width) : 0;
  }
  LONGLLAVA_INLINE void stage_keys(uint32_t* k, int64_t depth, const uint16_t* source, int64_t source_stride, int64_t n,
                                   int64_t n_padded, int64_t width, const int32_t* ids) {
    for (int64_t i = 0; i < n_padded; ++i, source += source_stride, k += depth) {
      const bool wanted = i < n && (ids == nullptr || ids[i] >= 0);
      for (int64_t d = 0; d < 2 * depth; d += WIDTH) {
        const int64_t left = wanted ? width - d : 0;
        const hvec numbers = halves(source + d, left);
        __builtin_memcpy(k + d / 2, &numbers, sizeof numbers);
      }
    }
  }
  // v[d][t] holds channel d of keys 2 t and 2 t + 1.
  LONGLLAVA_INLINE bool stage_values(uint32_t* v, int64_t stride, const uint16_t* source, int64_t source_stride,
                                     int64_t n, int64_t n_padded, int64_t width, const int32_t* ids) {
    uvec spoiled{};
    for (int64_t d = 0; d < round_up(width, TILE_HEIGHT); d += WIDTH)
      for (int64_t key = 0; key < n_padded; key += 2 * WIDTH) {
        vec square[WIDTH];
        for (int i = 0; i < WIDTH; ++i) {
          uvec words[2];
          for (int part = 0; part < 2; ++part) {
            const int64_t at = key + 2 * i + part;
            const bool wanted = at < n && (ids == nullptr || ids[at] >= 0);
            words[part] = wide(halves(source + at * source_stride + d, wanted ? width - d : 0));
            spoiled |= (uvec)((words[part] & 0x7f80u) == 0x7f80u);
          }
          square[i] = bits<vec>(words[0] | words[1] << 16);
        }
        transpose(square);
        for (int i = 0; i < WIDTH; ++i) store(v + (d + i) * stride + key / 2, bits<uvec>(square[i]));
      }
    return _mm512_test_epi32_mask((__m512i)spoiled, (__m512i)spoiled) == 0;
  }

 private:
  // The first WIDTH of `left` numbers; what is not there is 0 and not read.
  LONGLLAVA_INLINE hvec halves(const uint16_t* p, int64_t left) {
    if (left >= WIDTH) return load_as<hvec>(p);
    return (hvec)_mm256_maskz_loadu_epi16(first_lanes(left > 0 ? int(left) : 0), p);
  }
  LONGLLAVA_INLINE uvec wide(hvec x) { return (uvec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }
};

// Registers 0 to 3 hold 32 rows x N vectors of sums, 4 and 5 rows of a, 6 and 7 vectors of b, 16 words at a time.
template <int N>
LONGLLAVA_INLINE void add_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t depth) {
  for (int64_t t = 0; t < depth; t += 16) {
    _tile_loadd(4, a + t, a_row * 4);
    _tile_loadd(6, b + t * b_row, b_row * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + 16 * a_row + t, a_row * 4);
    _tile_dpbf16ps(2, 5, 6);
    if (N > 1) {
      _tile_loadd(7, b + t * b_row + 16, b_row * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// The sums from and to memory, `row` floats from one row to the next.
template <int N>
LONGLLAVA_INLINE void load_tiles(const float* from, int64_t row) {
  _tile_loadd(0, from, row * 4);
  _tile_loadd(2, from + 16 * row, row * 4);
  if (N > 1) {
    _tile_loadd(1, from + 16, row * 4);
    _tile_loadd(3, from + 16 * row + 16, row * 4);
  }
}

template <int N>
LONGLLAVA_INLINE void store_tiles(float* to, int64_t row) {
  _tile_stored(0, to, row * 4);
  _tile_stored(2, to + 16 * row, row * 4);
  if (N > 1) {
    _tile_stored(1, to + 16, row * 4);
    _tile_stored(3, to + 16 * row + 16, row * 4);
  }
}

// scores[key][row] = k . q
template <int N>
LONGLLAVA_INLINE void score_keys(Tiles, float* scores, const uint32_t* k, int64_t k_stride, const uint32_t* q_panel,
                                 int64_t depth, int64_t n_keys, float) {
  memory_is_read();
  for (int64_t key = 0; key < n_keys; key += 32) {
    _tile_zero(0);
    _tile_zero(2);
    if (N > 1) {
      _tile_zero(1);
      _tile_zero(3);
    }
    add_tiles<N>(k + key * k_stride, k_stride, q_panel, N * WIDTH, depth);
    store_tiles<N>(scores + key * N * WIDTH, N * WIDTH);
  }
  memory_is_read();
}

// sums[d][row] = sums[d][row] * shrink[row] + sum over keys of v[d][key] p[key][row]
template <int N>
LONGLLAVA_INLINE void add_values(Tiles, float* sums_panel, int64_t width, const uint32_t* v, int64_t v_stride,
                                 const uint32_t* p, int64_t p_step, int64_t depth, const vec (&shrink)[N]) {
  __mmask16 changed = 0;
  for (int j = 0; j < N; ++j) changed |= _mm512_cmp_ps_mask((__m512)shrink[j], (__m512)splat(1.0f), _CMP_NEQ_UQ);
  if (changed != 0)
    for (int64_t d = 0; d < width; ++d)
      for (int j = 0; j < N; ++j) {
        float* place = sums_panel + (d * N + j) * WIDTH;
        store(place, load(place) * shrink[j]);
      }
  memory_is_read();
  constexpr int64_t row = N * WIDTH;
  for (int64_t d = 0; d < width; d += 32) {
    load_tiles<N>(sums_panel + d * row, row);
    add_tiles<N>(v + d * v_stride, v_stride, p, p_step, depth);
    store_tiles<N>(sums_panel + d * row, row);
  }
  memory_is_read();
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
