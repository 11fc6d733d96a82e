// Gradients of attention (Dao et al. 2022, arXiv:2205.14135, Alg. 4), p recomputed from lse block by block.
//
//     p = 2^(scale log2(e) q.k - lse log2(e))      dp = grad_y . v      ds = p (dp - grad_y . y + grad_lse)
//     grad_v += p grad_y      grad_k += scale ds q      grad_q += scale ds k
// A task walks chunks of keys: the chunk's k and v (fp32) and their gradients stay in the cache while tiles of
// TILE rows pass by. Rows lie in the lanes for the scores, dp and grad_q (as in attention_forward.h); for grad_k and
// grad_v the channels do, and p and ds are broadcast. All products are fp32, for bf16 input too.
#include "attention_products.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int64_t TILE = 96;  // rows: whole panels in AVX2 (24) and AVX-512 (48); p and ds of a block are 24 KiB each

// What a tile of rows needs, packed once per chunk of keys.
struct Tile {
  float *q, *grad_y;            // panels: [channel][row]
  float *q_rows, *grad_y_rows;  // [row][channel]
  float *log2_sums, *offsets;   // lse in base 2; grad_y . y - grad_lse
  float* grad_q;                // panels: [channel][row]
  int32_t *ends, *ids;
};

template <class Input>
LONGLLAVA_INLINE void pack_tile(Tile& tile, const AttentionBackwardCall& call, const AttentionTask& task,
                                const Panels& rows, int64_t k_width, int64_t stride) {
  const int64_t width = call.head_dim;
  for (int64_t i = 0; i < rows.n_vectors * WIDTH * k_width; ++i) tile.grad_q[i] = 0;
  for (int64_t row = 0; row < rows.n_vectors * WIDTH; ++row) {
    float *q = tile.q_rows + row * stride, *grad_y = tile.grad_y_rows + row * stride;
    const float lse = row < task.n_rows ? call.lse[row_number(call, task, row)] : NEGATIVE_INFINITY;
    tile.log2_sums[row] = 0;
    tile.offsets[row] = 0;
    if (lse == NEGATIVE_INFINITY) {  // the row sees nothing: it has no part in any gradient, whatever it holds
      for (int64_t d = 0; d < stride; ++d) q[d] = grad_y[d] = 0;
      continue;
    }
    stage(q, stride, row_of<const Input>(call.q, call.q_strides, call, task, row), 0, 1, 1, width, nullptr);
    stage(grad_y, stride, row_of<const Input>(call.grad_y, call.grad_y_strides, call, task, row), 0, 1, 1, width, nullptr);
    const Input* y = row_of<const Input>(call.y, call.y_strides, call, task, row);
    vec sums{};
    int64_t d = 0;
    for (; d + WIDTH <= width; d += WIDTH) sums += load(y + d) * load(grad_y + d);
    float sum = sum_lanes(sums);
    for (; d < width; ++d) sum += load_one(y + d) * grad_y[d];
    tile.offsets[row] = sum - (call.grad_lse == nullptr ? 0 : call.grad_lse[row_number(call, task, row)]);
    tile.log2_sums[row] = lse * LOG2_E;
  }
  for (int64_t panel = 0; panel < rows.n_panels; ++panel) {
    const int64_t start = rows.start(panel) * WIDTH, n = rows.start(panel + 1) * WIDTH - start;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t d = 0; d < width; ++d) {
        tile.q[start * width + d * n + i] = tile.q_rows[(start + i) * stride + d];
        tile.grad_y[start * width + d * n + i] = tile.grad_y_rows[(start + i) * stride + d];
      }
    }
  }
}

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

// sums[key][channel] += weights[key][row] * rows[row][channel]
LONGLLAVA_INLINE void add_rows(float* sums, int64_t stride, const float* weights, const float* rows, int64_t n_keys,
                               int64_t n_rows, const Panels& channels) {
  for (int64_t panel = 0; panel < channels.n_panels; ++panel) {
    const int64_t start = channels.start(panel) * WIDTH;
    with_count(channels.start(panel + 1) - channels.start(panel), [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      for (int64_t key = 0; key < n_keys; key += TILE_HEIGHT) {
        float* place = sums + key * stride + start;
        vec held[TILE_HEIGHT][N];
#pragma GCC unroll 8
        for (int i = 0; i < TILE_HEIGHT; ++i)
          for (int j = 0; j < N; ++j) held[i][j] = load(place + i * stride + j * WIDTH);
        add_products<Single>(held, weights + key * TILE, TILE, 1, rows + start, stride, n_rows);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_HEIGHT; ++i)
          for (int j = 0; j < N; ++j) store(place + i * stride + j * WIDTH, held[i][j]);
      }
    });
  }
}

// Memory and sizes of one task.
struct Work {
  int64_t width, k_width, stride;  // channels; in whole tile heights; in whole vectors
  float *k, *v, *grad_k, *grad_v;  // the chunk: [key][channel], k and v `k_width` wide, the gradients `stride`
  float *scores, *dp, *p, *ds;
  bool k_finite[64];
};

// One block of keys against one tile of rows. Rows of panels that see nothing of it count as 0.
LONGLLAVA_INLINE void differentiate_block(const Work& work, Tile& tile, const AttentionBackwardCall& call,
                                          const AttentionTask& task, const Panels& rows, const Panels& channels,
                                          int64_t chunk_start, int64_t first) {
  const KeyRange* range = key_range(call, task, first);
  const int32_t* key_ids = call.seq_k == nullptr ? nullptr : call.seq_k + task.batch * call.n_keys + first;
  const int64_t in_chunk = first - chunk_start, n_left = call.n_keys - first;
  const int64_t n_block = n_left < KEY_BLOCK ? n_left : KEY_BLOCK;
  const int64_t n_keys = round_up(n_block, TILE_HEIGHT);
  const float *k = work.k + in_chunk * work.k_width, *v = work.v + in_chunk * work.k_width;
  int64_t from = rows.n_vectors * WIDTH, to = 0;  // the rows that see something of the block
  for (int64_t panel = 0; panel < rows.n_panels; ++panel) {
    const int64_t start = rows.start(panel) * WIDTH, end = rows.start(panel + 1) * WIDTH;
    const PanelView view(tile.ends + start, tile.ids + start, (end < task.n_rows ? end : task.n_rows) - start);
    if (view.last_end <= first || (range != nullptr && !view.may_see(*range))) {
      for (int64_t key = 0; key < n_keys && to > 0; ++key)
        for (int64_t row = start; row < end; ++row) work.p[key * TILE + row] = work.ds[key * TILE + row] = 0;
      continue;
    }
    if (to == 0) from = start;
    to = end;
    const bool masked = view.first_end < first + n_keys || (range != nullptr && !view.sees_all(*range));
    with_count(rows.start(panel + 1) - rows.start(panel), [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      score_keys<N>(Single{}, work.scores, k, work.k_width, tile.q + start * work.width, work.width, n_keys,
                    call.scale * LOG2_E);
      if (masked) mask_scores<N>(work.scores, n_keys, first, key_ids, n_block, tile.ends + start, tile.ids + start);
      score_keys<N>(Single{}, work.dp, v, work.k_width, tile.grad_y + start * work.width, work.width, n_keys, 1.0f);
      differentiate_scores<N>(work.p + start, work.ds + start, work.scores, work.dp, n_keys, tile.log2_sums + start,
                              tile.offsets + start);
      vec keep[N];
      for (int j = 0; j < N; ++j) keep[j] = splat(1.0f);
      float* grad_q = tile.grad_q + start * work.k_width;
      if (masked && !work.k_finite[in_chunk / KEY_BLOCK]) {
        add_values_seen<N>(Single{}, grad_q, work.width, k, work.k_width, work.ds + start, TILE, n_keys, keep);
      } else {
        add_values<N>(Single{}, grad_q, work.k_width, k, work.k_width, work.ds + start, TILE, n_keys, keep);
      }
    });
  }
  if (to == 0) return;
  add_rows(work.grad_v + in_chunk * work.stride, work.stride, work.p + from, tile.grad_y_rows + from * work.stride,
           n_keys, to - from, channels);
  add_rows(work.grad_k + in_chunk * work.stride, work.stride, work.ds + from, tile.q_rows + from * work.stride,
           n_keys, to - from, channels);
}

template <class Input>
void differentiate_chunks(const AttentionBackwardCall& call, int64_t index) {
  AttentionTask task{};
  const int64_t lane = index % call.n_lanes;
  task.group = index / call.n_lanes % call.n_groups;
  task.batch = index / call.n_lanes / call.n_groups;
  task.end_key = call.n_keys;
  Work work{};
  const int64_t width = work.width = call.head_dim;
  work.k_width = round_up(width, TILE_HEIGHT);
  const Panels channels(width);
  work.stride = channels.n_vectors * WIDTH;
  Scratch scratch(2 * call.chunk_keys * (work.k_width + work.stride) + 3 * TILE * (work.k_width + work.stride) +
                  4 * TILE + 2 * KEY_BLOCK * (TILE + TILE_VECTORS * WIDTH) + 512);
  work.k = scratch.get<float>(call.chunk_keys * work.k_width);
  work.v = scratch.get<float>(call.chunk_keys * work.k_width);
  work.grad_k = scratch.get<float>(call.chunk_keys * work.stride);
  work.grad_v = scratch.get<float>(call.chunk_keys * work.stride);
  work.scores = scratch.get<float>(KEY_BLOCK * TILE_VECTORS * WIDTH);
  work.dp = scratch.get<float>(KEY_BLOCK * TILE_VECTORS * WIDTH);
  work.p = scratch.get<float>(KEY_BLOCK * TILE);
  work.ds = scratch.get<float>(KEY_BLOCK * TILE);
  Tile tile;
  tile.q = scratch.get<float>(TILE * width);
  tile.grad_y = scratch.get<float>(TILE * width);
  tile.q_rows = scratch.get<float>(TILE * work.stride);
  tile.grad_y_rows = scratch.get<float>(TILE * work.stride);
  tile.grad_q = scratch.get<float>(TILE * work.k_width);
  tile.log2_sums = scratch.get<float>(TILE);
  tile.offsets = scratch.get<float>(TILE);
  tile.ends = scratch.get<int32_t>(TILE);
  tile.ids = scratch.get<int32_t>(TILE);

  const AttentionStrides &k_strides = call.k_strides, &v_strides = call.v_strides;
  const Input* k = static_cast<const Input*>(call.k) + task.batch * k_strides.batch + task.group * k_strides.head;
  const Input* v = static_cast<const Input*>(call.v) + task.batch * v_strides.batch + task.group * v_strides.head;
  float* grad_q_part = call.grad_q_parts + lane * call.batch * call.n_queries * call.n_heads * width;

  for (int64_t chunk = lane; chunk < call.n_chunks; chunk += call.n_lanes) {
    const int64_t start = chunk * call.chunk_keys;
    const int64_t end = start + call.chunk_keys < call.n_keys ? start + call.chunk_keys : call.n_keys;
    for (int64_t first = start; first < end; first += KEY_BLOCK) {
      const int64_t n = end - first < KEY_BLOCK ? end - first : KEY_BLOCK;
      const int32_t* ids = call.seq_k == nullptr ? nullptr : call.seq_k + task.batch * call.n_keys + first;
      const int64_t place = (first - start) * work.k_width, n_staged = round_up(n, TILE_HEIGHT);
      work.k_finite[(first - start) / KEY_BLOCK] =
          stage(work.k + place, work.k_width, k + first * k_strides.token, k_strides.token, n, n_staged, width, ids);
      stage(work.v + place, work.k_width, v + first * v_strides.token, v_strides.token, n, n_staged, width, ids);
    }
    for (int64_t i = 0; i < call.chunk_keys * work.stride; ++i) work.grad_k[i] = work.grad_v[i] = 0;

    for (int64_t query = 0; query < call.n_queries; query += call.tile_queries) {
      task.first_query = query;
      task.n_queries = call.n_queries - query < call.tile_queries ? call.n_queries - query : call.tile_queries;
      task.n_rows = task.n_queries * call.heads_per_group;
      if (call.end_of_keys(query + task.n_queries - 1) <= start) continue;
      const Panels rows(task.n_rows);
      describe_rows(call, task, rows.n_vectors * WIDTH, tile.ends, tile.ids);
      const PanelView view(tile.ends, tile.ids, task.n_rows);
      bool packed = false;
      for (int64_t first = start; first < end && first < view.last_end; first += KEY_BLOCK) {
        const KeyRange* range = key_range(call, task, first);
        if (range != nullptr && !view.may_see(*range)) continue;
        if (!packed) pack_tile<Input>(tile, call, task, rows, work.k_width, work.stride);
        packed = true;
        differentiate_block(work, tile, call, task, rows, channels, start, first);
      }
      if (!packed) continue;
      call.touched[call.touched_place(lane, task.batch, task.group, query / call.tile_queries)] = 1;
      for (int64_t panel = 0; panel < rows.n_panels; ++panel) {
        const int64_t from = rows.start(panel) * WIDTH, n = rows.start(panel + 1) * WIDTH - from;
        for (int64_t row = from; row < from + n && row < task.n_rows; ++row) {
          float* target = grad_q_part + row_number(call, task, row) * width;
          for (int64_t d = 0; d < width; ++d) target[d] += tile.grad_q[from * work.k_width + d * n + row - from];
        }
      }
    }
    Input* grad_k = static_cast<Input*>(call.grad_k) + task.batch * call.grad_k_strides.batch + task.group * call.grad_k_strides.head;
    Input* grad_v = static_cast<Input*>(call.grad_v) + task.batch * call.grad_v_strides.batch + task.group * call.grad_v_strides.head;
    for (int64_t key = start; key < end; ++key) {
      for (int64_t d = 0; d < width; ++d) {
        const int64_t place = (key - start) * work.stride + d;
        store_one(grad_k + key * call.grad_k_strides.token + d, work.grad_k[place] * call.scale);
        store_one(grad_v + key * call.grad_v_strides.token + d, work.grad_v[place]);
      }
    }
  }
}

}  // namespace

void attention_backward_float(const AttentionBackwardCall& call, int64_t index) { differentiate_chunks<float>(call, index); }
void attention_backward_bf16(const AttentionBackwardCall& call, int64_t index) {
  differentiate_chunks<uint16_t>(call, index);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
