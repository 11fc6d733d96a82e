// Pieces that the attention kernels share: scratch memory, rows in lanes, what a row sees, a row's result.
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
    if (start_ == nullptr) abort();  // up to some MB: a system that cannot give them cannot go on either
    next_ = start_;
  }
  ~Scratch() { free(start_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static int64_t padded(int64_t n_floats) { return round_up(n_floats, 16); }
  template <class Element>  // of 32 bits
  Element* get(int64_t n) {
    Element* piece = reinterpret_cast<Element*>(next_);
    next_ += padded(n);
    return piece;
  }

 private:
  float* start_;
  float* next_;
};

// Rows lie side by side in vectors; a panel is 1 to TILE_VECTORS vectors of them. `n` vectors are dealt out evenly.
struct Panels {
  int64_t n_vectors, n_panels;
  explicit Panels(int64_t n_rows)
      : n_vectors((n_rows + WIDTH - 1) / WIDTH), n_panels((n_vectors + TILE_VECTORS - 1) / TILE_VECTORS) {}
  int64_t start(int64_t panel) const { return panel * n_vectors / n_panels; }  // in vectors
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls run(Count<1>{}), run(Count<2>{}) or run(Count<3>{}): the number of vectors is a constant in the loop.
template <class Run>
LONGLLAVA_INLINE void with_count(int64_t n_vectors, const Run& run) {
  switch (n_vectors) {
    case 1: run(Count<1>{}); break;
    case 2: run(Count<2>{}); break;
    default: run(Count<TILE_VECTORS>{}); break;
  }
}

// What the rows of one panel may see. `ids` are the rows' seq_idx, with HIDDEN for a row that sees nothing.
constexpr int32_t HIDDEN = -2;  // no key has it: a key's padding counts as -1, whatever is below 0 there

struct PanelView {
  int64_t first_end, last_end;  // the first and the last row see keys below these, as far as order goes
  int32_t low, high;            // the rows' seq_idx >= 0
  bool has_hidden;

  // ids may be null where there is no seq_idx: then only the ends are known.
  PanelView(const int32_t* ends, const int32_t* ids, int64_t n_rows)
      : first_end(ends[0]), last_end(ends[n_rows - 1]), low(INT32_MAX), high(-1), has_hidden(false) {
    for (int64_t i = 0; ids != nullptr && i < n_rows; ++i) {
      if (ids[i] < 0) {
        has_hidden = true;
      } else {
        low = ids[i] < low ? ids[i] : low;
        high = ids[i] > high ? ids[i] : high;
      }
    }
  }
  bool may_see(const KeyRange& keys) const { return keys.low <= high && low <= keys.high; }
  bool sees_all(const KeyRange& keys) const {
    return low == high && keys.low == low && keys.high == low && !has_hidden && !keys.has_padding;
  }
};

// Fills, for a task's rows, where their keys end and their seq_idx; places up to n_padded repeat the last row.
LONGLLAVA_INLINE void describe_rows(const AttentionCall& call, const AttentionTask& task, int64_t n_padded,
                                    int32_t* ends, int32_t* ids) {
  for (int64_t row = 0; row < n_padded; ++row) {
    const int64_t real = row < task.n_rows ? row : task.n_rows - 1;
    const int64_t query = task.first_query + real / call.heads_per_group;
    const int64_t end = call.end_of_keys(query);
    ends[row] = static_cast<int32_t>(end < task.end_key ? end : task.end_key);
    const int32_t id = call.seq_q == nullptr ? 0 : call.seq_q[task.batch * call.n_queries + query];
    ids[row] = id < 0 ? HIDDEN : id;
  }
}

constexpr float LN_2 = 0.693147180559945f;

// Where a task's row begins in q, y or their gradients.
template <class Element, class Pointer>
LONGLLAVA_INLINE Element* row_of(Pointer start, const AttentionStrides& strides, const AttentionCall& call,
                                 const AttentionTask& task, int64_t row) {
  const int64_t query = task.first_query + row / call.heads_per_group;
  const int64_t head = task.group * call.heads_per_group + row % call.heads_per_group;
  return static_cast<Element*>(start) + task.batch * strides.batch + query * strides.token + head * strides.head;
}
// The same in lse and what else is (B, L, H).
LONGLLAVA_INLINE int64_t row_number(const AttentionCall& call, const AttentionTask& task, int64_t row) {
  const int64_t query = task.first_query + row / call.heads_per_group;
  return (task.batch * call.n_queries + query) * call.n_heads + task.group * call.heads_per_group +
         row % call.heads_per_group;
}

LONGLLAVA_INLINE const KeyRange* key_range(const AttentionCall& call, const AttentionTask& task, int64_t first_key) {
  if (call.key_ranges == nullptr) return nullptr;
  return call.key_ranges + task.batch * call.n_key_blocks + first_key / call.key_block;
}

// Rows of k or v that are read next, fetched a share at a time: they lie apart, in memory where keys are many.
struct AheadRows {
  const char* start;
  int64_t row_bytes, stride_bytes, n;

  template <class Input>
  AheadRows(const Input* rows, int64_t stride, int64_t width, int64_t n_rows)
      : start(reinterpret_cast<const char*>(rows)), row_bytes(width * int64_t(sizeof(Input))),
        stride_bytes(stride * int64_t(sizeof(Input))), n(n_rows) {}

  void fetch(int64_t share, int64_t n_shares) const {
    for (int64_t i = n * share / n_shares; i < n * (share + 1) / n_shares; ++i)
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(start + i * stride_bytes + byte, 0, 2);
  }
};

// Copies n rows of `width` numbers as fp32 into rows of `stride` floats. A row whose seq_idx is padding becomes 0,
// so what it holds cannot matter; so do columns up to `stride` and rows up to n_padded. True if all is finite.
template <class Input>
LONGLLAVA_INLINE bool stage_rows(float* target, int64_t stride, const Input* source, int64_t source_stride, int64_t n,
                                 int64_t n_padded, int64_t width, const int32_t* ids) {
  vec spoiled{};
  float spoiled_one = 0;
  for (int64_t i = 0; i < n_padded; ++i, source += source_stride, target += stride) {
    int64_t c = 0;
    if (i < n && (ids == nullptr || ids[i] >= 0)) {
      for (; c + WIDTH <= width; c += WIDTH) {
        const vec value = load(source + c);
        spoiled += value - value;
        store(target + c, value);
      }
      for (; c < width; ++c) {
        target[c] = load_one(source + c);
        spoiled_one += target[c] - target[c];
      }
    }
    for (; c < stride; ++c) target[c] = 0;
  }
  return sum_lanes(spoiled) + spoiled_one == 0;
}

// Hides what a panel's rows must not see: scores (key, row) of invisible pairs become -infinity.
template <int N>
LONGLLAVA_INLINE void mask_scores(float* scores, int64_t n_keys, int64_t first_key, const int32_t* key_ids,
                                  int64_t n_ids, const int32_t* ends, const int32_t* ids) {
  ivec row_end[N], row_id[N];
  for (int j = 0; j < N; ++j) {
    row_end[j] = load(ends + j * WIDTH);
    row_id[j] = load(ids + j * WIDTH);
  }
  for (int64_t key = 0; key < n_keys; ++key) {
    const ivec position = splat(static_cast<int32_t>(first_key + key));
    const ivec id = splat(key_ids == nullptr ? 0 : key < n_ids && key_ids[key] >= 0 ? key_ids[key] : -1);
    for (int j = 0; j < N; ++j) {
      float* place = scores + (key * N + j) * WIDTH;
      const ivec visible = (position < row_end[j]) & (id == row_id[j]);
      store(place, visible ? load(place) : splat(NEGATIVE_INFINITY));
    }
  }
}

// Writes one row's result: y and lse where the keys were not split, else its part.
// `sums` are p v over the keys, `step` apart; p = 2^(score - top), total = sum of p.
template <class Input>
LONGLLAVA_INLINE void finish_row(const AttentionCall& call, const AttentionTask& task, int64_t index, int64_t row,
                                 const float* sums, int64_t step, float top, float total) {
  const int64_t width = call.head_dim;
  if (call.n_splits > 1) {
    float* part = call.partial + (index * call.tile_queries * call.heads_per_group + row) * (width + 2);
    for (int64_t d = 0; d < width; ++d) part[d] = sums[d * step];
    part[width] = top;
    part[width + 1] = total;
    return;
  }
  Input* y = row_of<Input>(call.y, call.y_strides, call, task, row);
  const float scale = total == 0 ? 0 : 1 / total;  // a row that sees nothing; NaN passes on
  for (int64_t d = 0; d < width; ++d) store_one(y + d, sums[d * step] * scale);
  if (call.lse != nullptr)
    call.lse[row_number(call, task, row)] = (top + __builtin_log2f(total)) * LN_2;  // -infinity for such a row
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
