// The helper warps of the scan's forward kernel (selective_scan_forward.cuh), and the shared memory it works in.
#pragma once

#include "selective_scan_cuda.cuh"

namespace longllava {

constexpr int SCAN_HELPERS = 128;
constexpr int SCAN_PITCH = SCAN_CHANNELS + 8;  // of a row of partial sums: four lanes' rows then fill all 32 banks

constexpr int SCAN_AHEAD = 3;  // tiles in work, following, and being prepared

template <class T, int TOKENS, int DEPTH>
struct ForwardShared {
  // tiles alive: one being finished, one in work, one that follows it, one being prepared, DEPTH on their way
  static constexpr int RING = DEPTH + 4;
  float d[SCAN_AHEAD][TOKENS][SCAN_CHANNELS];       // steps
  float x[SCAN_AHEAD][TOKENS][SCAN_CHANNELS];       // d u
  float rows[SCAN_AHEAD][TOKENS][2 * SCAN_STATES];  // B, C
  float partial[2][TOKENS][4][SCAN_PITCH];       // each lane's part of C . h
  T raw[RING][3][TOKENS][SCAN_CHANNELS];         // u, delta, z
};

// With int8 rows a tile of y is kept until all blocks have added to its tokens' maxima: they may be as far apart as
// SCAN_LAG - 1 tiles before one waits for another.
constexpr int SCAN_LAG = 3;
template <class T, int TOKENS, int DEPTH>
constexpr int64_t INT8_BYTES =
    sizeof(ForwardShared<T, TOKENS, DEPTH>) + (SCAN_LAG + 1) * TOKENS * SCAN_CHANNELS * sizeof(T);

// SPLIT: other warps finish tiles than those that prepare them, so that neither waits for the other's long chains.
template <bool SPLIT> constexpr int SCAN_ALL_HELPERS = SCAN_HELPERS * (SPLIT ? 2 : 1);
template <int PER_THREAD, bool SPLIT>
constexpr int SCAN_THREADS = SCAN_CHANNELS * 4 / PER_THREAD + SCAN_ALL_HELPERS<SPLIT>;

// What a helper thread carries from tile to tile: four channels of every eighth token.
template <class T, int TOKENS, int DEPTH, bool FAST, bool STATES_ONLY, bool INT8>
struct Helper {
  using Shared = ForwardShared<T, TOKENS, DEPTH>;
  static constexpr int N_TENSORS = STATES_ONLY ? 2 : 3;
  static constexpr int PER_COPY = 16 / sizeof(T), COPIES = SCAN_CHANNELS / PER_COPY;  // of a row
  static constexpr int N_ROWS = (TOKENS + 15) / 16;  // quads of B and C that a thread brings

  const ScanArguments& p;
  Shared& shared;
  const int id, group, phase, n_tokens;  // of the span
  const int n_channels;                  // of the block, from this thread's four on; may be below 0
  const int n_copied;                    // the same from this thread's copies on
  const int8_t* flags;                   // of the span's tokens, or null
  const T* sources[3];                   // where this thread's copies of the next tile begin
  int64_t steps[3];
  const T* row_source;
  int64_t row_step;
  T* y;
  float* maxima;
  const int64_t row, first_channel;  // of the span's first token; of this thread
  int copied_at = 0, copied_slot = 0;  // first token of the tile to copy next, its place in the ring
  Quad<T> rows[N_ROWS];
  float bias[4], skip[4];

  __device__ Helper(const ScanArguments& p, const Place& at, Shared& shared, int id)
      : p(p), shared(shared), id(id), group(id % 16), phase(id / 16), n_tokens(int(at.end - at.begin)),
        n_channels(int(min(p.channels - at.channel, int64_t(SCAN_CHANNELS))) - group * 4),
        n_copied(n_channels + group * 4 - id % COPIES * PER_COPY), row(at.batch * p.length + at.begin),
        first_channel(at.channel + group * 4) {
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
    y = static_cast<T*>(p.y.data) + (row + phase) * p.channels + at.channel + group * 4;
    maxima = p.maxima == nullptr ? nullptr : p.maxima + row;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bias[j] = p.bias != nullptr && j < n_channels ? p.bias[at.channel + group * 4 + j] : 0.0f;
      skip[j] = p.D != nullptr && j < n_channels ? p.D[at.channel + group * 4 + j] : 0.0f;
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
      if (TOKENS * COPIES % SCAN_HELPERS != 0 && k + id >= TOKENS * COPIES) break;
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

  // B and C of the next tile into registers, a tile before they are needed.
  __device__ void load_rows(int token) {
    const int first = id % 4 * 4;
#pragma unroll
    for (int i = 0; i < N_ROWS; ++i) {
      const int t = id / 8 + i * 16;
      const bool wanted = (TOKENS % 16 == 0 || t < TOKENS) && real(token + t) && !(STATES_ONLY && id % 8 >= 4);
      rows[i] = load_row(row_source + i * 16 * row_step, first, wanted, FAST || p.wide, p.states);
    }
    row_source += TOKENS * row_step;
  }

  __device__ void put_rows(int buffer) {
#pragma unroll
    for (int i = 0; i < N_ROWS; ++i) {
      if (TOKENS % 16 != 0 && id / 8 + i * 16 >= TOKENS) break;
      const Quad<T>& r = rows[i];
      *reinterpret_cast<float4*>(&shared.rows[buffer][id / 8 + i * 16][id % 8 * 4]) =
          make_float4(to_float(r.v[0]), to_float(r.v[1]), to_float(r.v[2]), to_float(r.v[3]));
    }
  }

  // Steps of a tile. They are exactly 0 where there is no token, which leaves the state as it is.
  __device__ void prepare(int token, int slot, int buffer) {
#pragma unroll
    for (int k = 0; k < TOKENS; k += 8) {
      const int t = k + phase;
      const Quad<T> delta = *reinterpret_cast<const Quad<T>*>(&shared.raw[slot][1][t][group * 4]);
      const Quad<T> u = *reinterpret_cast<const Quad<T>*>(&shared.raw[slot][0][t][group * 4]);
      const bool is_real = real(token + t);
      float d[4], x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) d[j] = to_float(delta.v[j]) + bias[j];
      if (p.softplus) {
#pragma unroll
        for (int j = 0; j < 4; ++j) d[j] = softplus(d[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        d[j] = is_real ? d[j] : 0.0f;
        x[j] = d[j] * to_float(u.v[j]);
      }
      *reinterpret_cast<float4*>(&shared.d[buffer][t][group * 4]) = make_float4(d[0], d[1], d[2], d[3]);
      *reinterpret_cast<float4*>(&shared.x[buffer][t][group * 4]) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }

  // y of the tile after the one finished last: sums over lanes, skip, gate, store.
  __device__ void finish(int token, int slot, int buffer) {
#pragma unroll
    for (int k = 0; k < TOKENS; k += 8) {
      const int t = k + phase;
      const Quad<T> u = *reinterpret_cast<const Quad<T>*>(&shared.raw[slot][0][t][group * 4]);
      float4 part[4];
#pragma unroll
      for (int g = 0; g < 4; ++g)
        part[g] = *reinterpret_cast<const float4*>(&shared.partial[buffer][t][g][group * 4]);
      float out[4] = {
          (part[0].x + part[1].x) + (part[2].x + part[3].x), (part[0].y + part[1].y) + (part[2].y + part[3].y),
          (part[0].z + part[1].z) + (part[2].z + part[3].z), (part[0].w + part[1].w) + (part[2].w + part[3].w)};
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = fmaf(skip[j], to_float(u.v[j]), out[j]);
      if (p.z.data != nullptr) {
        const Quad<T> z = *reinterpret_cast<const Quad<T>*>(&shared.raw[slot][2][t][group * 4]);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] *= to_float(z.v[j]) * sigmoid(to_float(z.v[j]));
      }
      if (!FAST) {
        const bool is_real = real(token + t);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = is_real ? out[j] : 0.0f;
      }
      const Quad<T> four = quad_from(out, T());
      if constexpr (INT8) *held(token, t) = four;
      else if (token + t < n_tokens) store(y + k * p.channels, four);
      if (INT8 || maxima != nullptr) write_maximum(four, token + t);
    }
    y += TOKENS * p.channels;
  }

  __device__ Quad<T>* held(int token, int t) const {
    T* first = reinterpret_cast<T*>(dynamic_shared() + sizeof(Shared));
    const int slot = token / TOKENS % (SCAN_LAG + 1);
    return reinterpret_cast<Quad<T>*>(first + (slot * TOKENS + t) * SCAN_CHANNELS + group * 4);
  }

  // Of a tile finished in an earlier step: its maxima are there for all blocks to see.
  __device__ void tell(int token) const {
    if (id == 0) arrive(p.arrived + arrivals(token));
  }

  __device__ int64_t arrivals(int token) const {
    return row / p.length * ((p.length + TOKENS - 1) / TOKENS) + token / TOKENS;
  }

  // A tile's y as int8, by the rule of longllava/ops/quantized.py: waits for the other blocks' part of its maxima.
  __device__ void emit(int token) const {
    wait_for_blocks(p.arrived + arrivals(token), int((p.channels + SCAN_CHANNELS - 1) / SCAN_CHANNELS));
#pragma unroll
    for (int k = 0; k < TOKENS; k += 8) {
      const int t = k + phase;
      if (token + t >= n_tokens) break;
      const float most = load_of_others(maxima + token + t);
      const bool finite = magnitude(most) < 0x7f800000, seen = finite && magnitude(most) >= 0x0d800000;  // 2^-100
      const float factor = divide(127.0f, seen ? most : 127.0f);
      const Quad<T> four = *held(token, t);
      Several<int8_t, 4> out;  // no value is above the largest, so that none leaves -127 .. 127
#pragma unroll
      for (int j = 0; j < 4; ++j) out.v[j] = int8_t(seen ? nearest(to_float(four.v[j]) * factor) : 0);
      if (n_channels > 0)
        *reinterpret_cast<Several<int8_t, 4>*>(p.rows + (row + token + t) * p.channels + first_channel) = out;
      if (first_channel == 0) p.scales[row + token + t] = finite ? divide(seen ? most : 127.0f, 127.0f) : NAN;
    }
  }

  __device__ void store(T* to, const Quad<T>& four) const {
    if (FAST || p.wide) {
      if (n_channels > 0) *reinterpret_cast<Quad<T>*>(to) = four;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < n_channels) to[j] = four.v[j];
    }
  }

  // Of the values as they are stored. The 16 lanes of a token find their largest, one of them tells.
  __device__ void write_maximum(const Quad<T>& four, int token) const {
    int most = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < n_channels) most = max(most, magnitude(to_float(four.v[j])));
    for (int distance = 8; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, distance));
    if (group == 0 && token < n_tokens && most != 0) atomic_max_magnitude(maxima + token, most);
  }
};

}  // namespace longllava
