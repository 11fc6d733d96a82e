// Pieces that the attention kernels share: small matrix products in registers, what a row sees, a row's result.
#pragma once

#include <stdlib.h>

#include "attention.h"
#include "attention_simd.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// Memory for one task, 64-byte aligned, handed out piece by piece.
class Scratch {
 public:
  explicit Scratch(int64_t n_floats) : start_(static_cast<float*>(aligned_alloc(64, round_up(4 * n_floats, 64)))) {
    if (start_ == nullptr) abort();  // some 100 KB: a system that cannot give them cannot go on either
    next_ = start_;
  }
  ~Scratch() { free(start_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static int64_t padded(int64_t n_floats) { return round_up(n_floats, 16); }
  float* floats(int64_t n) {
    float* piece = next_;
    next_ += padded(n);
    return piece;
  }
  int32_t* ints(int64_t n) { return reinterpret_cast<int32_t*>(floats(n)); }

 private:
  float* start_;
  float* next_;
};

// fp32: one number of a and one vector of b at a time.
struct Single {
  typedef float Element;
  typedef Vec Vector;
  static constexpr int DEPTH = 1;
  LONGLLAVA_INLINE Vec add_product(Vec sum, float a, Vec b) { return sum + broadcast(a) * b; }
};

#if defined(__AVX512BF16__) || defined(LONGLLAVA_EMULATE_BF16)
// bf16: two numbers of a and two of b at a time, the first in the low half of 32 bits.
struct Pair {
  typedef uint32_t Element;
  typedef Bits Vector;
  static constexpr int DEPTH = 2;
  LONGLLAVA_INLINE Vec add_product(Vec sum, uint32_t a, Bits b) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)broadcast(a), (__m512bh)b);
#else
    const Bits wide = broadcast(a);
    sum += (Vec)(wide & 0xffff0000u) * (Vec)(b & 0xffff0000u);
    return sum + (Vec)(wide << 16) * (Vec)(b << 16);
#endif
  }
};
#endif

// sums[i][j] += a[i * a_row + t * a_step] * b[t * b_step + j's vector] over t < depth.
template <class Dot, int N>
LONGLLAVA_INLINE void add_products(Vec (&sums)[TILE_HEIGHT][N], const typename Dot::Element* a, int64_t a_row,
                                   int64_t a_step, const typename Dot::Element* b, int64_t b_step, int64_t depth) {
  for (int64_t t = 0; t < depth; ++t, a += a_step, b += b_step) {
    typename Dot::Vector vectors[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) vectors[j] = load_as<typename Dot::Vector>(b + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_HEIGHT; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][j] = Dot::add_product(sums[i][j], a[i * a_row], vectors[j]);
    }
  }
}

// Rows lie side by side in vectors; a panel is 1 to TILE_VECTORS vectors of them. `n` vectors are dealt out evenly.
struct Panels {
  int64_t n_vectors, n_panels;
  explicit Panels(int64_t n_rows)
      : n_vectors((n_rows + LANES - 1) / LANES), n_panels((n_vectors + TILE_VECTORS - 1) / TILE_VECTORS) {}
  int64_t start(int64_t panel) const { return panel * n_vectors / n_panels; }  // in vectors
};

// Calls run<1>, run<2> or run<3>: the number of vectors becomes a constant of the compiled loop.
template <class Run>
LONGLLAVA_INLINE void with_width(int64_t n_vectors, const Run& run) {
  switch (n_vectors) {
    case 1: run.template operator()<1>(); break;
    case 2: run.template operator()<2>(); break;
    default: run.template operator()<TILE_VECTORS>(); break;
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
