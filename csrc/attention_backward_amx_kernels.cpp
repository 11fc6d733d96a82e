// Gradients of attention, products in tiles of bf16 (attention_amx.h). How they are walked: attention_backward_walk.h.
//
// p and ds are rounded to bf16 for their products, as the flash kernels of GPUs do; sums, softmax and ds's own terms
// are fp32.
#define LONGLLAVA_PAIRS
#include "amx.h"
#if defined(LONGLLAVA_AMX)
#include "attention_amx.h"
#include "attention_backward_walk.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int64_t PAIRS = TILE / 2;  // words of a key's row of p or ds

LONGLLAVA_INLINE uvec widened(__m256i halves) { return (uvec)_mm512_maskz_cvtepu16_epi32(0xffff, halves); }
LONGLLAVA_INLINE __m256i load_raw(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

struct TileBlocks : BackwardWork {
  static constexpr int64_t ROWS = 32;  // a panel: two vectors
  const TileRegisters registers;
  const int64_t depth;                // words of a row of k, v, q or grad_y: 32 channels to 16
  const int64_t columns_stride, columns_size;  // of a block of k's columns
  uint32_t *k, *v;                    // the chunk: [key][pair of channels]
  uint32_t* k_columns;                // [block][channel][pair of keys]
  bool k_finite[64];
  uint16_t *q_raw, *grad_y_raw;       // the tile's rows as they come, what is missing 0
  uint32_t *q, *grad_y;               // panels: [pair of channels][row]
  uint32_t *q_rows, *grad_y_rows;     // [pair of rows][channel]
  float *scores, *dp;                 // of a block and a panel
  uint16_t *p, *ds;                   // of a block: [key][row]
  uint32_t* ds_pairs;                 // of a block and a panel: [pair of keys][row]

  static int64_t depth_of(const AttentionBackwardCall& call) { return Tiles::depth(call.head_dim); }
  static int64_t floats(const AttentionBackwardCall& call) {
    const int64_t depth = depth_of(call), blocks = call.chunk_keys / KEY_BLOCK;
    return BackwardWork::floats(call, 2 * depth, 2 * depth) + 2 * call.chunk_keys * depth +
           blocks * Tiles::v_size(KEY_BLOCK, 2 * depth) + 6 * TILE * depth + 2 * KEY_BLOCK * 32 +
           2 * KEY_BLOCK * PAIRS + KEY_BLOCK / 2 * 32 + 256;
  }
  TileBlocks(const AttentionBackwardCall& call, Scratch& scratch)
      : BackwardWork(call, scratch, 2 * depth_of(call), 2 * depth_of(call)), depth(depth_of(call)),
        columns_stride(Tiles::v_stride(KEY_BLOCK, k_width)), columns_size(Tiles::v_size(KEY_BLOCK, k_width)) {
    k = scratch.get<uint32_t>(call.chunk_keys * depth);
    v = scratch.get<uint32_t>(call.chunk_keys * depth);
    k_columns = scratch.get<uint32_t>(call.chunk_keys / KEY_BLOCK * columns_size);
    q_raw = reinterpret_cast<uint16_t*>(scratch.get<uint32_t>(TILE * depth));
    grad_y_raw = reinterpret_cast<uint16_t*>(scratch.get<uint32_t>(TILE * depth));
    q = scratch.get<uint32_t>(TILE * depth);
    grad_y = scratch.get<uint32_t>(TILE * depth);
    q_rows = scratch.get<uint32_t>(PAIRS * stride);
    grad_y_rows = scratch.get<uint32_t>(PAIRS * stride);
    scores = scratch.get<float>(KEY_BLOCK * 32);
    dp = scratch.get<float>(KEY_BLOCK * 32);
    p = reinterpret_cast<uint16_t*>(scratch.get<uint32_t>(KEY_BLOCK * PAIRS));
    ds = reinterpret_cast<uint16_t*>(scratch.get<uint32_t>(KEY_BLOCK * PAIRS));
    ds_pairs = scratch.get<uint32_t>(KEY_BLOCK / 2 * 32);
  }

  void stage(int64_t in_chunk, const uint16_t* k_rows, int64_t k_token, const uint16_t* v_rows, int64_t v_token,
             int64_t n, const int32_t* ids) {
    const int64_t block = in_chunk / KEY_BLOCK, n_staged = round_up(n, TILE_HEIGHT);
    Tiles::stage_keys(k + in_chunk * depth, depth, k_rows, k_token, n, n_staged, width, ids);
    Tiles::stage_keys(v + in_chunk * depth, depth, v_rows, v_token, n, n_staged, width, ids);
    k_finite[block] = Tiles::stage_values(k_columns + block * columns_size, columns_stride, k_rows, k_token, n,
                                          n_staged, width, ids);
  }

  template <class Input>
  void take_row(int64_t row, const Input* of_q, const Input* of_grad_y) {
    copy_row(q_raw + row * 2 * depth, of_q);
    copy_row(grad_y_raw + row * 2 * depth, of_grad_y);
  }

  void pack(const Panels& rows) {
    for (int64_t row = 0; row < rows.n_vectors * WIDTH; row += WIDTH) {
      to_lanes(q, q_raw, row);
      to_lanes(grad_y, grad_y_raw, row);
      to_pairs(q_rows, q_raw, row);
      to_pairs(grad_y_rows, grad_y_raw, row);
    }
  }

  void clear(int64_t start, int64_t end, int64_t n_keys) {
    for (int64_t key = 0; key < n_keys; ++key) {
      __builtin_memset(p + key * TILE + start, 0, 2 * (end - start));
      __builtin_memset(ds + key * TILE + start, 0, 2 * (end - start));
    }
  }

  void differentiate(const PanelOfBlock& part, float scale) {
    const int64_t start = part.start, n_keys = part.n_keys, block = part.in_chunk / KEY_BLOCK;
    score_keys<2>(Tiles{}, scores, k + part.in_chunk * depth, depth, q + start * depth, depth, n_keys, 1.0f);
    if (part.masked)
      mask_scores<2>(scores, n_keys, part.first, part.key_ids, part.n_block, ends + start, ids + start);
    score_keys<2>(Tiles{}, dp, v + part.in_chunk * depth, depth, grad_y + start * depth, depth, n_keys, 1.0f);
    differentiate_scores(start, n_keys, scale);
    const vec keep[2] = {splat(1.0f), splat(1.0f)};
    float* sums = grad_q + start * k_width;
    const uint32_t* columns = k_columns + block * columns_size;
    if (part.masked && !k_finite[block]) {
      add_values_seen<2>(Tiles{}, sums, width, columns, columns_stride, ds_pairs, 32, n_keys / 2, keep);
    } else {
      add_values<2>(Tiles{}, sums, k_width, columns, columns_stride, ds_pairs, 32, n_keys / 2, keep);
    }
  }

  void add_to_keys(int64_t in_chunk, int64_t n_keys, int64_t from, int64_t to) {
    add_rows(grad_v + in_chunk * stride, p, grad_y_rows, n_keys, from, to);
    add_rows(grad_k + in_chunk * stride, ds, q_rows, n_keys, from, to);
  }

 private:
  void copy_row(uint16_t* raw, const uint16_t* given) const {
    const int64_t n = given == nullptr ? 0 : width;
    if (n != 0) __builtin_memcpy(raw, given, 2 * n);
    __builtin_memset(raw + n, 0, 2 * (2 * depth - n));
  }

  // Sixteen rows of the tile, one to a lane, into their panel.
  void to_lanes(uint32_t* panels, const uint16_t* raw, int64_t row) const {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(raw) + row * depth;
    uint32_t* panel = panels + row / ROWS * ROWS * depth + row % ROWS;
    for (int64_t t = 0; t < depth; t += WIDTH) {
      vec square[WIDTH];
      for (int i = 0; i < WIDTH; ++i) square[i] = bits<vec>(load(words + i * depth + t));
      transpose(square);
      for (int i = 0; i < WIDTH; ++i) store(panel + (t + i) * ROWS, bits<uvec>(square[i]));
    }
  }

  // Of sixteen rows two to a word, channel by channel.
  void to_pairs(uint32_t* pairs, const uint16_t* raw, int64_t row) const {
    for (int64_t r = row; r < row + WIDTH; r += 2)
      for (int64_t d = 0; d < stride; d += WIDTH) {
        const uvec low = widened(load_raw(raw + r * stride + d)), high = widened(load_raw(raw + (r + 1) * stride + d));
        store(pairs + r / 2 * stride + d, low | high << 16);
      }
  }

  // scores and dp become p and ds, as rows of keys and, ds, in pairs of keys.
  void differentiate_scores(int64_t start, int64_t n_keys, float scale) {
    for (int64_t t = 0; t < n_keys / 2; ++t)
      for (int j = 0; j < 2; ++j) {
        const vec sums = load(log2_sums + start + j * WIDTH), offset = load(offsets + start + j * WIDTH);
        uvec halves[2];
        for (int part = 0; part < 2; ++part) {
          const int64_t key = 2 * t + part, place = (key * 2 + j) * WIDTH, to = key * TILE + start + j * WIDTH;
          const vec score = load(scores + place);
          // an unseen key counts as 0 though lse be NaN for what the row does see
          const vec one = score == NEGATIVE_INFINITY ? vec{} : exp2_of(score * scale - sums);
          const vec slope = one == 0.0f ? vec{} : one * (load(dp + place) - offset);  // an unseen v may hold NaN
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + to), (__m256i)_mm512_cvtneps_pbh((__m512)one));
          const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)slope);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + to), rounded);
          halves[part] = widened(rounded);
        }
        store(ds_pairs + t * 32 + j * WIDTH, halves[0] | halves[1] << 16);
      }
  }

  // sums[key][channel] += weights[key][row] * rows[row][channel], over rows from `from` to `to`
  void add_rows(float* sums, const uint16_t* weights, const uint32_t* rows, int64_t n_keys, int64_t from, int64_t to) {
    memory_is_read();
    const uint32_t* words = reinterpret_cast<const uint32_t*>(weights) + from / 2;
    for (int64_t key = 0; key < n_keys; key += 32)
      for (int64_t d = 0; d < stride; d += 32) {
        float* place = sums + key * stride + d;
        load_tiles<2>(place, stride);
        add_tiles<2>(words + key * PAIRS, PAIRS, rows + from / 2 * stride + d, stride, (to - from) / 2);
        store_tiles<2>(place, stride);
      }
    memory_is_read();
  }
};

}  // namespace

void attention_backward(const AttentionBackwardCall& call, int64_t index) {
  differentiate_chunks<uint16_t, TileBlocks>(call, index);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
LONGLLAVA_AMX_END
#endif
