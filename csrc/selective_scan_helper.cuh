// The helper warps of the scan's forward kernel (selective_scan_forward.cuh).
#pragma once

#include "selective_scan_forward_shared.cuh"

namespace longllava {

// What a helper thread carries from tile to tile: two channels of four tokens in sixteen.
template <class T, int TOKENS, int DEPTH, bool FAST, bool STATES_ONLY, bool INT8>
struct Helper {
  using Shared = ForwardShared<T, TOKENS, DEPTH>;
  static constexpr int N_TENSORS = STATES_ONLY ? 2 : 3, FIRST_TILES = Shared::FIRST_TILES;
  static constexpr int PER_COPY = 16 / sizeof(T), COPIES = SCAN_CHANNELS / PER_COPY;  // of a row
  static constexpr int N_ROWS = TOKENS / 16;  // quads of B and C that a thread brings

  const ScanArguments& p;
  Shared& shared;
  const int id, pair, group, n_tokens;  // pair of channels, group of a tile's tokens; tokens of the span
  const int n_all;                      // channels of the block
  const int n_channels;                 // of these, from this thread's pair on; may be below 0
  const int n_copied;                   // the same from this thread's copies on
  const int8_t* flags;                   // of the span's tokens, or null
  const T* sources[3];                   // where this thread's copies of the next tile begin
  int64_t steps[3];
  const T* row_source;
  int64_t row_step;
  T* y;
  float* maxima;
  const int64_t row, first_channel;  // of the span's first token; of the block
  int copied_at = FIRST_TILES * TOKENS, copied_slot = FIRST_TILES;  // the tile to copy next: token, place in the ring
  Quad<T> rows[N_ROWS];
  float bias[2], skip[2];

  __device__ Helper(const ScanArguments& p, const Place& at, Shared& shared, int id)
      : p(p), shared(shared), id(id), pair(id % SCAN_HALF), group(id / SCAN_HALF), n_tokens(int(at.end - at.begin)),
        n_all(int(min(p.channels - at.channel, int64_t(SCAN_CHANNELS)))), n_channels(n_all - pair * 2),
        n_copied(n_all - id % COPIES * PER_COPY), row(at.batch * p.length + at.begin), first_channel(at.channel) {
    const Rows* tensors[3] = {&p.u, &p.delta, &p.z};
#pragma unroll
    for (int i = 0; i < N_TENSORS; ++i) {
      steps[i] = tensors[i]->step;
      sources[i] = static_cast<const T*>(tensors[i]->data);
      if (sources[i] != nullptr)
        sources[i] += at.batch * tensors[i]->batch_stride + (at.begin + id / COPIES) * steps[i] + at.channel +
                      id % COPIES * PER_COPY;
    }
    const Rows& B_or_C = id % 8 < 4 ? p.B : p.C;
    row_step = B_or_C.step;
    row_source = static_cast<const T*>(B_or_C.data) + at.batch * B_or_C.batch_stride + (at.begin + id / 8) * row_step;
    flags = p.flags == nullptr ? nullptr : p.flags + row;
    y = static_cast<T*>(p.y.data) + (row + group * SCAN_GROUP) * p.channels + at.channel + pair * 2;
    maxima = p.maxima == nullptr ? nullptr : p.maxima + row;
  }

  // What the first tiles are prepared from, before any of it may be read. Warps that finish tiles ask for z.
  __device__ void prefetch_first(bool prepares) const {
#pragma unroll
    for (int i = 0; i < N_TENSORS; ++i) {
      if (sources[i] == nullptr || n_copied <= 0 || prepares == (i == 2)) continue;
#pragma unroll 1
      for (int t = 0; t < FIRST_TILES * TOKENS && id / COPIES + t < n_tokens; t += SCAN_HELPERS / COPIES)
        prefetch(sources[i] + t * steps[i]);
    }
    for (int t = prepares ? TOKENS : 0, end = t + TOKENS; t < end; t += 16)
      if (id % 4 * 4 < p.states && id / 8 + t < n_tokens) prefetch(row_source + t * row_step + id % 4 * 4);
    if (p.bias != nullptr && n_channels > 0) prefetch(p.bias + first_channel + pair * 2);
  }

  __device__ void load_channels() {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bias[c] = p.bias != nullptr && c < n_channels ? p.bias[first_channel + pair * 2 + c] : 0.0f;
      skip[c] = p.D != nullptr && c < n_channels ? p.D[first_channel + pair * 2 + c] : 0.0f;
    }
  }

  // Whether a token of the span exists and is no padding.
  __device__ bool real(int token) const {
    return token < n_tokens && (FAST || flags == nullptr || flags[token] != FLAG_PADDING);
  }

  // Asks for tensors FROM to TO - 1 of a tile, each in the order of tiles. Nothing is read at padding, which is zeros.
  template <int FROM, int TO> __device__ void copy(int token, int slot) {
#pragma unroll
    for (int k = 0; k < TOKENS * COPIES; k += SCAN_HELPERS) {
      const int t = id / COPIES + k / COPIES;
      const bool wanted = real(token + t) && n_copied > 0;
#pragma unroll
      for (int i = FROM; i < TO; ++i) {
        if (i == 2 && sources[2] == nullptr) continue;
        const T* from = sources[i] + k / COPIES * steps[i];
        T* to = &shared.raw[slot][i][t][id % COPIES * PER_COPY];
        if (FAST || p.wide) {
          copy_async_16(to, from, wanted);
        } else {
#pragma unroll
          for (int j = 0; j < PER_COPY; ++j) to[j] = wanted && j < n_copied ? from[j] : from_float<T>(0.0f);
        }
      }
    }
#pragma unroll
    for (int i = FROM; i < TO; ++i)
      if (sources[i] != nullptr) sources[i] += TOKENS * steps[i];
  }

  // Asks for the first tiles, a group of copies each, and last for their z, which is not read until main warps have
  // worked on a tile: so that as little as can be comes before what they wait for.
  __device__ void copy_first(bool prepares) {
#pragma unroll
    for (int i = 0; i < FIRST_TILES; ++i) {
      if (prepares && i * TOKENS < n_tokens) copy<0, 2>(i * TOKENS, i);
      commit_copies();
    }
#pragma unroll
    for (int i = 0; i < FIRST_TILES; ++i)
      if (prepares && i * TOKENS < n_tokens) copy<2, N_TENSORS>(i * TOKENS, i);
    commit_copies();
  }

  __device__ void copy_next() {
    copy<0, N_TENSORS>(copied_at, copied_slot);
    copied_at += TOKENS;
    copied_slot = copied_slot + 1 == Shared::RING ? 0 : copied_slot + 1;
  }

  __device__ void pass_rows() { row_source += TOKENS * row_step; }

  // B and C of the next tile into registers, a tile before they are needed.
  __device__ void load_rows(int token) {
    const int first = id % 4 * 4;
#pragma unroll
    for (int i = 0; i < N_ROWS; ++i) {
      const int t = id / 8 + i * 16;
      const bool wanted = real(token + t) && !(STATES_ONLY && id % 8 >= 4);
      rows[i] = load_row(row_source + i * 16 * row_step, first, wanted, FAST || p.wide, p.states);
    }
    pass_rows();
  }

  __device__ void put_rows(int buffer) {
#pragma unroll
    for (int i = 0; i < N_ROWS; ++i) {
      const PairBits<T>* two = reinterpret_cast<const PairBits<T>*>(&rows[i]);
      const float2 first = to_floats(two[0]), last = to_floats(two[1]);
      *reinterpret_cast<float4*>(&shared.rows[buffer][id / 8 + i * 16][id % 8 * 4]) =
          make_float4(first.x, first.y, last.x, last.y);
    }
  }

  // This thread's two channels of four tokens of a tile as it was copied.
  __device__ void load(int slot, int tensor, int t, float (&out)[2][SCAN_GROUP]) const {
#pragma unroll
    for (int j = 0; j < SCAN_GROUP; ++j) {
      const float2 two = to_floats(*reinterpret_cast<const PairBits<T>*>(&shared.raw[slot][tensor][t + j][pair * 2]));
      out[0][j] = two.x, out[1][j] = two.y;
    }
  }

  // Zeros where there is no token. A tile of tokens that all are real is left alone at the cost of one comparison.
  __device__ void clear(int token, int t, float (&x)[2][SCAN_GROUP]) const {
    if ((FAST || flags == nullptr) && token + TOKENS <= n_tokens) return;
#pragma unroll
    for (int j = 0; j < SCAN_GROUP; ++j)
      if (!real(token + t + j)) x[0][j] = x[1][j] = 0.0f;
  }

  // Steps of a tile. They are exactly 0 where there is no token, which leaves the state as it is.
  __device__ void prepare(int token, int slot, int buffer) {
#pragma unroll
    for (int k = 0; k < Shared::GROUPS; k += SCAN_HELPERS / SCAN_HALF) {
      const int t = (k + group) * SCAN_GROUP, place = buffer * Shared::GROUPS + k + group;
      float d[2][SCAN_GROUP], u[2][SCAN_GROUP];
      load(slot, 1, t, d);
      load(slot, 0, t, u);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int j = 0; j < SCAN_GROUP; ++j) d[c][j] += bias[c];
      if (p.softplus) {
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int j = 0; j < SCAN_GROUP; ++j) d[c][j] = softplus(d[c][j]);
      }
      clear(token, t, d);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = c * SCAN_HALF + pair;
        *reinterpret_cast<float4*>(shared.d[place][row]) = make_float4(d[c][0], d[c][1], d[c][2], d[c][3]);
        *reinterpret_cast<float4*>(shared.x[place][row]) =
            make_float4(d[c][0] * u[c][0], d[c][1] * u[c][1], d[c][2] * u[c][2], d[c][3] * u[c][3]);
      }
    }
  }

  // y of the tile after the one finished last: sums over lanes, skip, gate, store.
  __device__ void finish(int token, int slot, int buffer) {
#pragma unroll
    for (int k = 0; k < Shared::GROUPS; k += SCAN_HELPERS / SCAN_HALF) {
      const int t = (k + group) * SCAN_GROUP;
      float out[2][SCAN_GROUP], u[2][SCAN_GROUP];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float4 part[4];
#pragma unroll
        for (int g = 0; g < 4; ++g)
          part[g] = *reinterpret_cast<const float4*>(shared.partial[buffer][k + group][g][c * SCAN_HALF + pair]);
        out[c][0] = (part[0].x + part[1].x) + (part[2].x + part[3].x);
        out[c][1] = (part[0].y + part[1].y) + (part[2].y + part[3].y);
        out[c][2] = (part[0].z + part[1].z) + (part[2].z + part[3].z);
        out[c][3] = (part[0].w + part[1].w) + (part[2].w + part[3].w);
      }
      load(slot, 0, t, u);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int j = 0; j < SCAN_GROUP; ++j) out[c][j] = fmaf(skip[c], u[c][j], out[c][j]);
      if (p.z.data != nullptr) {
        float z[2][SCAN_GROUP];
        load(slot, 2, t, z);
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int j = 0; j < SCAN_GROUP; ++j) out[c][j] *= z[c][j] * sigmoid(z[c][j]);
      }
      if (!FAST) clear(token, t, out);
      PairBits<T> two[SCAN_GROUP];
#pragma unroll
      for (int j = 0; j < SCAN_GROUP; ++j) two[j] = bits_from(out[0][j], out[1][j], T());
      T* to = y + k * SCAN_GROUP * p.channels;
      const bool whole = FAST && token + TOKENS <= n_tokens && n_channels > 0;  // no store asks on its own
#pragma unroll
      for (int j = 0; j < SCAN_GROUP; ++j, to += p.channels) {
        if constexpr (INT8) *reinterpret_cast<PairBits<T>*>(held(token, t + j) + pair * 2) = two[j];
        else if (whole) *reinterpret_cast<PairBits<T>*>(to) = two[j];
        else if (token + t + j < n_tokens) store(to, two[j]);
      }
      if (INT8 || maxima != nullptr) {
#pragma unroll
        for (int j = 0; j < SCAN_GROUP; ++j) write_maximum(two[j], token + t + j);
      }
    }
    y += TOKENS * p.channels;
  }

  // Where a tile's rows of y wait for their maxima.
  __device__ T* held(int token, int t) const {
    T* first = reinterpret_cast<T*>(dynamic_shared() + sizeof(Shared));
    return first + (token / TOKENS % (SCAN_LAG + 1) * TOKENS + t) * SCAN_CHANNELS;
  }

  // Of a tile finished in an earlier step: its maxima are there for all blocks to see.
  __device__ void tell(int token) const { if (id == 0) arrive(p.arrived + arrivals(token)); }

  __device__ int64_t arrivals(int token) const {
    return row / p.length * ((p.length + TOKENS - 1) / TOKENS) + token / TOKENS;
  }

  // A tile's y as int8, by the rule of longllava/ops/quantized.py: waits for the other blocks' part of its maxima. A
  // thread has four channels of every eighth token.
  __device__ void emit(int token) const {
    wait_for_blocks(p.arrived + arrivals(token), int((p.channels + SCAN_CHANNELS - 1) / SCAN_CHANNELS));
    const int first = id % (SCAN_CHANNELS / 4) * 4;
#pragma unroll
    for (int k = 0; k < TOKENS; k += 8) {
      const int t = k + id / (SCAN_CHANNELS / 4);
      if (token + t >= n_tokens) break;
      const float most = load_of_others(maxima + token + t);
      const bool finite = magnitude(most) < 0x7f800000, seen = finite && magnitude(most) >= 0x0d800000;  // 2^-100
      const float factor = divide(127.0f, seen ? most : 127.0f);
      const Quad<T> four = *reinterpret_cast<const Quad<T>*>(held(token, t) + first);
      Several<int8_t, 4> out;  // no value is above the largest, so that none leaves -127 .. 127
#pragma unroll
      for (int j = 0; j < 4; ++j) out.v[j] = int8_t(seen ? nearest(to_float(four.v[j]) * factor) : 0);
      const int64_t at = row + token + t, channel = first_channel + first;
      if (first < n_all) *reinterpret_cast<Several<int8_t, 4>*>(p.rows + at * p.channels + channel) = out;
      if (channel == 0) p.scales[at] = finite ? divide(seen ? most : 127.0f, 127.0f) : NAN;
    }
  }

  __device__ void store(T* to, const PairBits<T>& two) const {
    if (FAST || p.wide) {
      if (n_channels > 0) *reinterpret_cast<PairBits<T>*>(to) = two;
    } else {
      const float2 both = to_floats(two);
      if (n_channels > 0) to[0] = from_float<T>(both.x);
      if (n_channels > 1) to[1] = from_float<T>(both.y);
    }
  }

  // Of the values as they are stored. The lanes of a warp have one token: they find their largest, one of them tells.
  __device__ void write_maximum(const PairBits<T>& bits, int token) const {
    const float2 two = to_floats(bits);
    const int most = warp_max(max(n_channels > 0 ? magnitude(two.x) : 0, n_channels > 1 ? magnitude(two.y) : 0));
    if (pair == 0 && token < n_tokens && most != 0) atomic_max_magnitude(maxima + token, most);
  }
};

}  // namespace longllava
