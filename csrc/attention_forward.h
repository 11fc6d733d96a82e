// Attention of a tile of queries over blocks of keys, with a running softmax (Dao et al. 2022, arXiv:2205.14135).
//
// Rows (query, head) lie in the lanes of vectors, keys and channels are broadcast. So scores (key, row) and sums
// (channel, row) need no transposition and no sum across lanes, all heads of a group share a block of keys, and
// a block is brought to fp32 (or paired bf16) once for 240 rows or more:
//     scores = k q' : TILE_HEIGHT keys x 1-3 vectors of rows in registers, K steps
//     p = 2^(scores - top), total, top                      the running softmax, elementwise
//     sums = sums * 2^(old top - top) + v' p : TILE_HEIGHT channels x the same rows, as many steps as the block has keys
// Scores, sums and softmax are fp32. For bf16 input on AVX512_BF16 the products are bf16 pairs summed in fp32, and
// p is rounded to bf16 for its product with v (the total takes it unrounded). With AMX the same products are taken by
// tiles (attention_amx_kernels.cpp).
#pragma once

#include "attention_products.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// Turns scores, times `scale`, into p = 2^(score - top) in place (of bf16: two keys to a word), brings top and total up
// to date, and returns by how much earlier sums shrink.
template <class Dot, int N>
LONGLLAVA_INLINE void softmax_step(float* scores, float scale, int64_t n_keys, float* tops, float* totals,
                                   vec (&shrink)[N]) {
  for (int j = 0; j < N; ++j) {
    const vec old_top = load(tops + j * WIDTH);
    vec most[4];  // in turn: a maximum waits for the one before
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = splat(NEGATIVE_INFINITY);
    for (int64_t key = 0; key < n_keys; key += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) most[i] = maximum(load(scores + ((key + i) * N + j) * WIDTH), most[i]);
    const vec block_top = maximum(maximum(most[0], most[1]), maximum(most[2], most[3])) * scale;
    // Any number near the maximum serves: p is 256 at most, and sums are rarely made to shrink.
    const vec top = block_top > old_top + 8.0f ? block_top : old_top;
    store(tops + j * WIDTH, top);
    const vec base = top == NEGATIVE_INFINITY ? vec{} : top;  // nothing seen so far: p is 0, not NaN
    shrink[j] = exp2_of(old_top - base);
    vec total{};
    for (int64_t t = 0; t < n_keys / Dot::DEPTH; ++t) {
      vec p[Dot::DEPTH];
      for (int part = 0; part < Dot::DEPTH; ++part) {
        p[part] = exp2_of(load(scores + ((t * Dot::DEPTH + part) * N + j) * WIDTH) * scale - base);
        total += p[part];
      }
      store(reinterpret_cast<typename Dot::Element*>(scores) + (t * N + j) * WIDTH, Dot::join(p));
    }
    store(totals + j * WIDTH, load(totals + j * WIDTH) * shrink[j] + total);
  }
}

template <class Input, class Dot>
void attend_tile(const AttentionCall& call, int64_t index) {
  typedef typename Dot::Element Element;
  const AttentionTask task = forward_task(call, index);
  const Panels panels(task.n_rows);
  const int64_t width = call.head_dim, block = call.key_block, n_padded = panels.n_vectors * WIDTH;
  const int64_t depth = Dot::depth(width);
  const int64_t v_width = round_up(width, TILE_HEIGHT);
  const int64_t v_stride = Dot::v_stride(block, v_width), v_size = Dot::v_size(block, v_width);
  const float scale = call.scale * LOG2_E;
  [[maybe_unused]] const typename Dot::Setup setup{};

  Scratch scratch(Scratch::padded(n_padded * depth) + Scratch::padded(n_padded * v_width) + 4 * n_padded +
                  Scratch::padded(block * depth) + Scratch::padded(v_size) + block * TILE_VECTORS * WIDTH + 256);
  Element* q = scratch.get<Element>(n_padded * depth);
  float* sums = scratch.get<float>(n_padded * v_width);
  float* tops = scratch.get<float>(n_padded);
  float* totals = scratch.get<float>(n_padded);
  int32_t* ends = scratch.get<int32_t>(n_padded);
  int32_t* ids = scratch.get<int32_t>(n_padded);
  Element* k = scratch.get<Element>(block * depth);
  Element* v = scratch.get<Element>(v_size);
  float* scores = scratch.get<float>(block * TILE_VECTORS * WIDTH);

  describe_rows(call, task, n_padded, ends, ids);
  for (int64_t i = 0; i < n_padded * v_width; ++i) sums[i] = 0;
  for (int64_t i = 0; i < n_padded; ++i) tops[i] = NEGATIVE_INFINITY, totals[i] = 0;
  pack_rows<Input, Dot>(q, call.q, call.q_strides, call, task, panels, depth);

  const AttentionStrides &k_strides = call.k_strides, &v_strides = call.v_strides;
  const Input* k_source = static_cast<const Input*>(call.k) + task.batch * k_strides.batch + task.group * k_strides.head;
  const Input* v_source = static_cast<const Input*>(call.v) + task.batch * v_strides.batch + task.group * v_strides.head;
  const int32_t* known_ids = call.seq_q == nullptr ? nullptr : ids;
  const PanelView tile(ends, known_ids, task.n_rows);
  const auto n_from = [&](int64_t key) {  // keys of the block that begins there
    const int64_t left = task.end_key - key;
    return left < 0 ? 0 : left < block ? left : block;
  };

  for (int64_t first = task.first_key; first < task.end_key; first += block) {
    const KeyRange* range = key_range(call, task, first);
    if (range != nullptr && !tile.may_see(*range)) continue;
    const int32_t* key_ids = call.seq_k == nullptr ? nullptr : call.seq_k + task.batch * call.n_keys + first;
    const int64_t n_block = n_from(first), n_staged = round_up(n_block, TILE_HEIGHT);
    Dot::stage_keys(k, depth, k_source + first * k_strides.token, k_strides.token, n_block, n_staged, width, key_ids);
    const bool finite = Dot::stage_values(v, v_stride, v_source + first * v_strides.token, v_strides.token, n_block,
                                          n_staged, width, key_ids);
    const int64_t after = first + block;
    const AheadRows k_ahead(k_source + after * k_strides.token, k_strides.token, width, n_from(after));
    const AheadRows v_ahead(v_source + after * v_strides.token, v_strides.token, width, n_from(after));
    for (int64_t panel = 0; panel < panels.n_panels; ++panel) {
      k_ahead.fetch(panel, panels.n_panels);
      v_ahead.fetch(panel, panels.n_panels);
      const int64_t start = panels.start(panel) * WIDTH, end = panels.start(panel + 1) * WIDTH;
      const int64_t n_rows = (end < task.n_rows ? end : task.n_rows) - start;
      const PanelView view(ends + start, known_ids == nullptr ? nullptr : ids + start, n_rows);
      if (view.last_end <= first || (range != nullptr && !view.may_see(*range))) continue;
      const int64_t n_seen = view.last_end - first < n_block ? view.last_end - first : n_block;
      const int64_t n_keys = round_up(n_seen, TILE_HEIGHT);
      const bool masked = view.first_end < first + n_keys || (range != nullptr && !view.sees_all(*range));
      with_count(panels.start(panel + 1) - panels.start(panel), [&](auto vectors) {
        constexpr int N = decltype(vectors)::value;
        vec shrink[N];
        score_keys<N>(Dot{}, scores, k, depth, q + start * depth, depth, n_keys, Dot::SCALES ? scale : 1.0f);
        if (masked) mask_scores<N>(scores, n_keys, first, key_ids, n_block, ends + start, ids + start);
        softmax_step<Dot, N>(scores, Dot::SCALES ? 1.0f : scale, n_keys, tops + start, totals + start, shrink);
        const Element* p = reinterpret_cast<const Element*>(scores);
        if (masked && !finite) {
          add_values_seen<N>(Dot{}, sums + start * v_width, width, v, v_stride, p, N * WIDTH, n_keys / Dot::DEPTH, shrink);
        } else {
          add_values<N>(Dot{}, sums + start * v_width, v_width, v, v_stride, p, N * WIDTH, n_keys / Dot::DEPTH, shrink);
        }
      });
    }
  }

  for (int64_t panel = 0; panel < panels.n_panels; ++panel) {
    const int64_t start = panels.start(panel) * WIDTH, end = panels.start(panel + 1) * WIDTH;
    for (int64_t row = start; row < end && row < task.n_rows; ++row)
      finish_row<Input>(call, task, index, row, sums + start * v_width + (row - start), end - start, tops[row], totals[row]);
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
