// Gradients of attention, products in fp32, for one instruction set (isa.h). Their walk: attention_backward_walk.h.
#include "attention_backward_walk.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

// scores and dp become p and ds, in the tile's [key][row] layout.
template <int N>
LONGLLAVA_INLINE void differentiate_scores(float* p, float* ds, const float* scores, const float* dp, int64_t n_keys,
                                           const float* log2_sums, const float* offsets) {
  for (int64_t key = 0; key < n_keys; ++key) {
    for (int j = 0; j < N; ++j) {
      const int64_t place = (key * N + j) * WIDTH;
      const vec score = load(scores + place);
      // an unseen key counts as 0 though lse be NaN for what the row does see
      const vec one = score == NEGATIVE_INFINITY ? vec{} : exp2_of(score - load(log2_sums + j * WIDTH));
      const vec slope = one * (load(dp + place) - load(offsets + j * WIDTH));
      store(p + key * TILE + j * WIDTH, one);
      store(ds + key * TILE + j * WIDTH, one == 0.0f ? vec{} : slope);  // an unseen v may hold NaN
    }
  }
}

// sums[key][channel] += weights[key][row] * rows[row][channel]; the sum over these rows by itself, as in add_values
LONGLLAVA_INLINE void add_rows(float* sums, int64_t stride, const float* weights, const float* rows, int64_t n_keys,
                               int64_t n_rows, const Panels& channels) {
  for (int64_t panel = 0; panel < channels.n_panels; ++panel) {
    const int64_t start = channels.start(panel) * WIDTH;
    with_count(channels.start(panel + 1) - channels.start(panel), [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      for (int64_t key = 0; key < n_keys; key += TILE_HEIGHT) {
        float* place = sums + key * stride + start;
        vec held[TILE_HEIGHT][N] = {};
        add_products<Single>(held, weights + key * TILE, TILE, 1, rows + start, stride, n_rows);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_HEIGHT; ++i)
          for (int j = 0; j < N; ++j) {
            float* sum = place + i * stride + j * WIDTH;
            store(sum, load(sum) + held[i][j]);
          }
      }
    });
  }
}

struct SingleBlocks : BackwardWork {
  static constexpr int64_t ROWS = 1;
  const Panels channels;
  float *k, *v;                 // the chunk: [key][channel], k_width wide
  bool k_finite[64];
  float *q, *grad_y;            // panels: [channel][row]
  float *q_rows, *grad_y_rows;  // [row][channel]
  float *scores, *dp, *p, *ds;  // of a block; p and ds 24 KiB each

  static int64_t floats(const AttentionBackwardCall& call) {
    const int64_t k_width = round_up(call.head_dim, TILE_HEIGHT), stride = round_up(call.head_dim, WIDTH);
    return BackwardWork::floats(call, k_width, stride) + 2 * call.chunk_keys * k_width +
           2 * TILE * (call.head_dim + stride) + 2 * KEY_BLOCK * (TILE + TILE_VECTORS * WIDTH) + 256;
  }
  SingleBlocks(const AttentionBackwardCall& call, Scratch& scratch)
      : BackwardWork(call, scratch, round_up(call.head_dim, TILE_HEIGHT), round_up(call.head_dim, WIDTH)),
        channels(width) {
    k = scratch.get<float>(call.chunk_keys * k_width);
    v = scratch.get<float>(call.chunk_keys * k_width);
    q = scratch.get<float>(TILE * width);
    grad_y = scratch.get<float>(TILE * width);
    q_rows = scratch.get<float>(TILE * stride);
    grad_y_rows = scratch.get<float>(TILE * stride);
    scores = scratch.get<float>(KEY_BLOCK * TILE_VECTORS * WIDTH);
    dp = scratch.get<float>(KEY_BLOCK * TILE_VECTORS * WIDTH);
    p = scratch.get<float>(KEY_BLOCK * TILE);
    ds = scratch.get<float>(KEY_BLOCK * TILE);
  }

  template <class Input>
  void stage(int64_t in_chunk, const Input* k_rows, int64_t k_token, const Input* v_rows, int64_t v_token, int64_t n,
             const int32_t* ids) {
    const int64_t place = in_chunk * k_width, n_staged = round_up(n, TILE_HEIGHT);
    k_finite[in_chunk / KEY_BLOCK] = stage_rows(k + place, k_width, k_rows, k_token, n, n_staged, width, ids);
    stage_rows(v + place, k_width, v_rows, v_token, n, n_staged, width, ids);
  }

  template <class Input>
  void take_row(int64_t row, const Input* of_q, const Input* of_grad_y) {
    const int64_t n = of_q == nullptr ? 0 : 1;
    stage_rows(q_rows + row * stride, stride, of_q, 0, n, 1, width, nullptr);
    stage_rows(grad_y_rows + row * stride, stride, of_grad_y, 0, n, 1, width, nullptr);
  }

  void pack(const Panels& rows) {
    for (int64_t panel = 0; panel < rows.n_panels; ++panel) {
      const int64_t start = rows.start(panel) * WIDTH, n = rows.start(panel + 1) * WIDTH - start;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t d = 0; d < width; ++d) {
          q[start * width + d * n + i] = q_rows[(start + i) * stride + d];
          grad_y[start * width + d * n + i] = grad_y_rows[(start + i) * stride + d];
        }
      }
    }
  }

  void clear(int64_t start, int64_t end, int64_t n_keys) {
    for (int64_t key = 0; key < n_keys; ++key)
      for (int64_t row = start; row < end; ++row) p[key * TILE + row] = ds[key * TILE + row] = 0;
  }

  void differentiate(const PanelOfBlock& part, float scale) {
    const int64_t start = part.start, n_keys = part.n_keys, place = part.in_chunk * k_width;
    with_count(part.n_vectors, [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      score_keys<N>(Single{}, scores, k + place, k_width, q + start * width, width, n_keys, scale);
      if (part.masked)
        mask_scores<N>(scores, n_keys, part.first, part.key_ids, part.n_block, ends + start, ids + start);
      score_keys<N>(Single{}, dp, v + place, k_width, grad_y + start * width, width, n_keys, 1.0f);
      differentiate_scores<N>(p + start, ds + start, scores, dp, n_keys, log2_sums + start, offsets + start);
      vec keep[N];
      for (int j = 0; j < N; ++j) keep[j] = splat(1.0f);
      float* sums = grad_q + start * k_width;
      if (part.masked && !k_finite[part.in_chunk / KEY_BLOCK]) {
        add_values_seen<N>(Single{}, sums, width, k + place, k_width, ds + start, TILE, n_keys, keep);
      } else {
        add_values<N>(Single{}, sums, k_width, k + place, k_width, ds + start, TILE, n_keys, keep);
      }
    });
  }

  void add_to_keys(int64_t in_chunk, int64_t n_keys, int64_t from, int64_t to) {
    add_rows(grad_v + in_chunk * stride, stride, p + from, grad_y_rows + from * stride, n_keys, to - from, channels);
    add_rows(grad_k + in_chunk * stride, stride, ds + from, q_rows + from * stride, n_keys, to - from, channels);
  }
};

}  // namespace

void attention_backward_float(const AttentionBackwardCall& call, int64_t index) {
  differentiate_chunks<float, SingleBlocks>(call, index);
}
void attention_backward_bf16(const AttentionBackwardCall& call, int64_t index) {
  differentiate_chunks<uint16_t, SingleBlocks>(call, index);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
