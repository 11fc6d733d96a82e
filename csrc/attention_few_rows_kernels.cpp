// Attention of up to 8 rows over many keys (decode): bound by reading k and v, once each, in their own type.
//
// Channels lie in the lanes. A block of KEY_BLOCK keys is scored (4 keys x 1, 2 or 4 rows at a time, a sum across
// lanes at the end), the running softmax goes over the scores, and p v is added up 1, 2 or 4 rows at a time. The
// block stays in the first-level cache while its rows are taken in turn.
#include "attention_tile.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int KEYS_AT_ONCE = 4;
constexpr int64_t MOST_ROWS = 8;

// scores[row][key] = scale * k . q for ROWS rows; columns beyond whole vectors one by one.
template <int ROWS, class Input>
LONGLLAVA_INLINE void score_rows(float* scores, const float* q, int64_t q_stride, const Input* k, int64_t k_stride,
                                 int64_t n_keys, int64_t width, float scale) {
  for (int64_t key = 0; key < n_keys; key += KEYS_AT_ONCE) {
    const Input* keys[KEYS_AT_ONCE];
    for (int64_t i = 0; i < KEYS_AT_ONCE; ++i)
      keys[i] = k + (key + i < n_keys ? key + i : n_keys - 1) * k_stride;  // the last block may end early
    vec sums[ROWS][KEYS_AT_ONCE] = {};
    int64_t c = 0;
    for (; c + WIDTH <= width; c += WIDTH) {
#pragma GCC unroll 8
      for (int i = 0; i < KEYS_AT_ONCE; ++i) {
        const vec channels = load(keys[i] + c);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) sums[row][i] += channels * load(q + row * q_stride + c);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      float* line = scores + row * KEY_BLOCK + key;
      store_sums_of_lanes(line, sums[row]);
      for (int i = 0; i < KEYS_AT_ONCE; ++i) {
        for (int64_t rest = c; rest < width; ++rest) line[i] += load_one(keys[i] + rest) * q[row * q_stride + rest];
        line[i] *= scale;
      }
    }
  }
}

// sums[row][d] += p[row][key] v[key][d] for ROWS rows and N vectors of channels from d on.
template <int ROWS, int N, class Input>
LONGLLAVA_INLINE void add_channels(float* sums, int64_t stride, const float* p, const Input* v, int64_t v_stride,
                                   int64_t n_keys) {
  vec held[ROWS][N] = {};  // of these keys alone, as in attention_products.h
  for (int64_t key = 0; key < n_keys; ++key, v += v_stride) {
    vec channels[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) channels[j] = load(v + j * WIDTH);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) held[row][j] += channels[j] * splat(p[row * KEY_BLOCK + key]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row)
    for (int j = 0; j < N; ++j) {
      float* place = sums + row * stride + j * WIDTH;
      store(place, load(place) + held[row][j]);
    }
}

// The same for all channels from d on: N vectors at a time, then half as many, then one by one.
template <int ROWS, int N, class Input>
LONGLLAVA_INLINE void add_rows(float* sums, int64_t stride, const float* p, const Input* v, int64_t v_stride,
                               int64_t n_keys, int64_t width, int64_t d = 0) {
  for (; d + N * WIDTH <= width; d += N * WIDTH)
    add_channels<ROWS, N>(sums + d, stride, p, v + d, v_stride, n_keys);
  if constexpr (N > 1) {
    add_rows<ROWS, N / 2>(sums, stride, p, v, v_stride, n_keys, width, d);
  } else {
    for (; d < width; ++d)
      for (int row = 0; row < ROWS; ++row) {
        float sum = 0;
        for (int64_t key = 0; key < n_keys; ++key) sum += p[row * KEY_BLOCK + key] * load_one(v + key * v_stride + d);
        sums[row * stride + d] += sum;
      }
  }
}

// The same where some keys are hidden from some rows: those add nothing, whatever v holds there.
template <class Input>
LONGLLAVA_INLINE void add_seen(float* sums, const float* p, const bool* seen, const Input* v, int64_t v_stride,
                               int64_t n_keys, int64_t width) {
  for (int64_t key = 0; key < n_keys; ++key)
    for (int64_t d = 0; seen[key] && d < width; ++d) sums[d] += p[key] * load_one(v + key * v_stride + d);
}

// Turns one row's scores into p in place, brings top and total up to date, returns by how much earlier sums shrink.
LONGLLAVA_INLINE float softmax_line(float* scores, float& top, float& total) {
  vec tops = splat(top), totals{};
  for (int64_t key = 0; key < KEY_BLOCK; key += WIDTH) tops = maximum(load(scores + key), tops);
  float new_top = top;
  for (int i = 0; i < WIDTH; ++i) new_top = tops[i] > new_top ? tops[i] : new_top;
  const vec base = splat(new_top == NEGATIVE_INFINITY ? 0 : new_top);
  for (int64_t key = 0; key < KEY_BLOCK; key += WIDTH) {
    const vec p = exp2_of(load(scores + key) - base);
    totals += p;
    store(scores + key, p);
  }
  const float shrink = exp2_of(splat(top) - base)[0];
  top = new_top;
  total = total * shrink + sum_lanes(totals);
  return shrink;
}

// Calls run(Count<rows>{}, row) over all rows, 4, 2 or 1 at a time.
template <class Run>
LONGLLAVA_INLINE void by_rows(int64_t n_rows, const Run& run) {
  int64_t row = 0;
  for (; row + 4 <= n_rows; row += 4) run(Count<4>{}, row);
  for (; row + 2 <= n_rows; row += 2) run(Count<2>{}, row);
  for (; row < n_rows; ++row) run(Count<1>{}, row);
}

template <class Input>
void attend_few_rows(const AttentionCall& call, int64_t index) {
  const AttentionTask task = forward_task(call, index);
  const int64_t width = call.head_dim, stride = round_up(width, 16), n_rows = task.n_rows;
  Scratch scratch(2 * n_rows * stride + MOST_ROWS * KEY_BLOCK);
  float* q = scratch.get<float>(n_rows * stride);
  float* sums = scratch.get<float>(n_rows * stride);
  float* scores = scratch.get<float>(MOST_ROWS * KEY_BLOCK);
  float tops[MOST_ROWS], totals[MOST_ROWS];
  int32_t ends[MOST_ROWS], ids[MOST_ROWS];
  bool seen[MOST_ROWS][KEY_BLOCK];

  describe_rows(call, task, n_rows, ends, ids);
  const PanelView view(ends, ids, n_rows);
  for (int64_t row = 0; row < n_rows; ++row) {
    tops[row] = NEGATIVE_INFINITY;
    totals[row] = 0;
    const Input* source = row_of<const Input>(call.q, call.q_strides, call, task, row);
    for (int64_t d = 0; d < width; ++d) q[row * stride + d] = load_one(source + d);
    for (int64_t d = 0; d < width; ++d) sums[row * stride + d] = 0;
  }
  const Input* k = static_cast<const Input*>(call.k) + task.batch * call.k_strides.batch + task.group * call.k_strides.head;
  const Input* v = static_cast<const Input*>(call.v) + task.batch * call.v_strides.batch + task.group * call.v_strides.head;

  for (int64_t first = task.first_key; first < task.end_key; first += KEY_BLOCK) {
    const KeyRange* range = key_range(call, task, first);
    if (range != nullptr && !view.may_see(*range)) continue;
    const int32_t* key_ids = call.seq_k == nullptr ? nullptr : call.seq_k + task.batch * call.n_keys + first;
    const int64_t n_keys = task.end_key - first < KEY_BLOCK ? task.end_key - first : KEY_BLOCK;
    const bool masked = view.first_end < first + n_keys || (range != nullptr && !view.sees_all(*range));
    const Input* k_block = k + first * call.k_strides.token;
    const Input* v_block = v + first * call.v_strides.token;
    by_rows(n_rows, [&](auto rows, int64_t row) {
      score_rows<decltype(rows)::value>(scores + row * KEY_BLOCK, q + row * stride, stride, k_block, call.k_strides.token,
                                        n_keys, width, call.scale * LOG2_E);
    });
    for (int64_t row = 0; row < n_rows; ++row) {
      float* line = scores + row * KEY_BLOCK;
      for (int64_t key = 0; masked && key < n_keys; ++key) {
        seen[row][key] = first + key < ends[row] && (key_ids == nullptr || (ids[row] >= 0 && key_ids[key] == ids[row]));
        if (!seen[row][key]) line[key] = NEGATIVE_INFINITY;
      }
      for (int64_t key = n_keys; key < KEY_BLOCK; ++key) line[key] = NEGATIVE_INFINITY;
      const float shrink = softmax_line(line, tops[row], totals[row]);
      for (int64_t d = 0; d < width; ++d) sums[row * stride + d] *= shrink;
      if (masked) add_seen(sums + row * stride, line, seen[row], v_block, call.v_strides.token, n_keys, width);
    }
    if (!masked)
      by_rows(n_rows, [&](auto rows, int64_t row) {
        constexpr int ROWS = decltype(rows)::value;
        add_rows<ROWS, 8 / ROWS>(sums + row * stride, stride, scores + row * KEY_BLOCK, v_block,
                                 call.v_strides.token, n_keys, width);
      });
  }
  for (int64_t row = 0; row < n_rows; ++row)
    finish_row<Input>(call, task, index, row, sums + row * stride, 1, tops[row], totals[row]);
}

}  // namespace

void attention_few_rows_float(const AttentionCall& call, int64_t index) { attend_few_rows<float>(call, index); }
void attention_few_rows_bf16(const AttentionCall& call, int64_t index) { attend_few_rows<uint16_t>(call, index); }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
