// The helper warps of the scan's forward kernel (selective_scan_forward.cuh), and the shared memory it works in.
#pragma once

#include "selective_scan_cuda.cuh"

namespace longllava {

constexpr int SCAN_HELPERS = 128;  // threads that prepare tiles, and as many that finish them
constexpr int SCAN_AHEAD = 3;  // tiles in work, following, and being prepared
constexpr int SCAN_GROUP = 4;  // tokens of a channel that lie side by side in shared memory: 16 bytes

// Rows of 16 bytes: a channel's steps of four tokens. A helper thread has two channels side by side, 2 i and 2 i + 1,
// which are rows i and 32 + i: so the 32 lanes of a warp write 32 rows that follow each other.
constexpr int SCAN_HALF = SCAN_CHANNELS / 2;
__device__ __forceinline__ int channel_of_row(int row) { return row % SCAN_HALF * 2 + row / SCAN_HALF; }

template <class T, int TOKENS, int DEPTH>
struct ForwardShared {
  // tiles alive: one being finished, one in work, one that follows it, one being prepared, DEPTH on their way
  static constexpr int RING = DEPTH + 4, GROUPS = TOKENS / SCAN_GROUP;
  static_assert(TOKENS % 16 == 0, "a warp of helpers has every fourth group, and sixteen rows of B and C");
  float d[SCAN_AHEAD * GROUPS][SCAN_CHANNELS][SCAN_GROUP];  // steps
  float x[SCAN_AHEAD * GROUPS][SCAN_CHANNELS][SCAN_GROUP];  // d u
  float rows[SCAN_AHEAD][TOKENS][2 * SCAN_STATES];          // B, C
  // each lane's part of C . h; two rows more, so that the four lanes of a channel write to different banks
  float partial[2][GROUPS][4][SCAN_CHANNELS + 2][SCAN_GROUP];
  T raw[RING][3][TOKENS][SCAN_CHANNELS];  // u, delta, z
};

// With int8 rows a tile of y is kept until all blocks have added to its tokens' maxima: they may be as far apart as
// SCAN_LAG - 1 tiles before one waits for another.
constexpr int SCAN_LAG = 3;
template <class T, int TOKENS, int DEPTH>
constexpr int64_t INT8_BYTES =
    sizeof(ForwardShared<T, TOKENS, DEPTH>) + (SCAN_LAG + 1) * TOKENS * SCAN_CHANNELS * sizeof(T);

constexpr int SCAN_THREADS = SCAN_CHANNELS * 4 + 2 * SCAN_HELPERS;  // main ones, preparing and finishing ones

// What a helper thread carries from tile to tile: two channels of four tokens in sixteen.
template <class T, int TOKENS, int DEPTH, bool FAST, bool STATES_ONLY, bool INT8>
struct Helper {
  using Shared = ForwardShared<T, TOKENS, DEPTH>;
  static constexpr int N_TENSORS = STATES_ONLY ? 2 : 3;
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
  int copied_at = 0, copied_slot = 0;  // first token of the tile to copy next, its place in the ring
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
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bias[c] = p.bias != nullptr && c < n_channels ? p.bias[at.channel + pair * 2 + c] : 0.0f;
      skip[c] = p.D != nullptr && c < n_channels ? p.D[at.channel + pair * 2 + c] : 0.0f;
    }
  }

  // Whether a token of the span exists and is no padding.
  __device__ bool real(int token) const {
    return token < n_tokens && (FAST || flags == nullptr || flags[token] != FLAG_PADDING);
  }

  // Asks for the tile after the one asked for last. Nothing is read at padding: zeros stand there.
  __device__ void copy() {
#pragma unroll
    for (int k = 0; k < TOKENS * COPIES; k += SCAN_HELPERS) {
      const int t = id / COPIES + k / COPIES;
      const bool wanted = real(copied_at + t) && n_copied > 0;
#pragma unroll
      for (int i = 0; i < N_TENSORS; ++i) {
        if (i == 2 && sources[2] == nullptr) continue;
        const T* from = sources[i] + k / COPIES * steps[i];
        T* to = &shared.raw[copied_slot][i][t][id % COPIES * PER_COPY];
        if (FAST || p.wide) {
          copy_async_16(to, from, wanted);
        } else {
#pragma unroll
          for (int j = 0; j < PER_COPY; ++j) to[j] = wanted && j < n_copied ? from[j] : from_float<T>(0.0f);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < N_TENSORS; ++i)
      if (sources[i] != nullptr) sources[i] += TOKENS * steps[i];
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
  __device__ void tell(int token) const {
    if (id == 0) arrive(p.arrived + arrivals(token));
  }

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
