// The C interface of the causal convolution on a GPU, and what its kernels share.
//
//   y_t = act(bias + sum_k weight_k x_(t - K + 1 + k)), over the real tokens of one sequence
//
// longllava/ops/causal_conv1d/cuda.py fills ConvArguments field by field, in this order, 8 bytes each.
//
// A thread holds a few channels side by side and walks a run of tokens with the window in registers, so that every
// element is read once; only a run's first window is read twice.
#pragma once

#include "rows.cuh"

namespace longllava {

constexpr int CONV_MAX_TAPS = 8;
constexpr int CONV_THREADS = 128;
constexpr int CONV_RUN = 32;            // tokens a thread walks
constexpr int CONV_BACKWARD_RUN = 64;   // backward, where each run also leaves a partial sum

struct ConvArguments {
  int64_t bytes;  // sizeof(ConvArguments), to catch a caller of another version
  int64_t dtype;  // of all Rows: 0 fp32, 1 bf16, 2 fp16
  int64_t batch, length, channels, taps, silu;
  int64_t wide;   // rows may be read four elements at a time
  int64_t weight_dtype;  // of weight and bias
  void* stream;
  Rows x, state, y, state_out;  // state.data may be null; state_out may be state where length <= CONV_RUN
  const void *weight, *bias;    // (E, K), (E) or null, at addresses that 16 divides
  const int32_t *sources, *last;  // (B, L, K), (B, K - 1): where in the line `state, then tokens` each tap reads, -1 is
                                  // nowhere; null without seq_idx
  Rows grad_y, grad_state, grad_x, grad_start;  // grad_state.data may be null
  float *grad_weight, *grad_bias;               // (runs, E, K), (runs, E): partial sums
  const int32_t* users;   // (B, K - 1 + L, K), backward: the token that reads a position of the line by each tap, or -1
  float* grad_sums;       // (B, L, E): scratch; both null without seq_idx
};

__device__ __forceinline__ float conv_sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-x * LOG2E)); }

// What a thread works on: N channels of a row of the batch, tokens (or positions) begin .. end - 1 of `length`.
template <int N, int RUN>
struct ConvPlace {
  int64_t batch, run, channel, begin, end;
  bool exists;
  __device__ ConvPlace(const ConvArguments& p, int64_t length) {
    // A division of 64 bits takes a hundred instructions; conv_launch sees to it that 32 are enough.
    const uint32_t groups = uint32_t((p.channels + N - 1) / N), runs = uint32_t((length + RUN - 1) / RUN);
    const uint32_t id = blockIdx.x * CONV_THREADS + threadIdx.x, of_all = id / groups;
    channel = int64_t(id % groups) * N;
    run = of_all;
    batch = of_all / runs;
    begin = int64_t(of_all % runs) * RUN;
    end = begin + RUN < length ? begin + RUN : length;
    exists = batch < p.batch;
  }
};

// A kernel over `length` tokens or positions. 2^32 threads, or more, are refused: of whole runs no GPU has the memory,
// but rows of one token would wrap around at 8 GiB.
template <int N, int RUN> int conv_launch(void (*kernel)(ConvArguments), const ConvArguments& p, int64_t length) {
  const int64_t groups = (p.channels + N - 1) / N, runs = (length + RUN - 1) / RUN;
  const int64_t blocks = (p.batch * runs * groups + CONV_THREADS - 1) / CONV_THREADS;
  if (blocks >= (int64_t{1} << 32) / CONV_THREADS) return cudaErrorInvalidConfiguration;
  return launch(kernel, blocks, CONV_THREADS, 0, p.stream, p);
}

template <class T>
__device__ __forceinline__ T* conv_spot(const Rows& rows, int64_t batch, int64_t row, int64_t channel) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.step + channel;
}
template <class T, int N>
__device__ __forceinline__ Several<T, N> conv_load(const Rows& rows, int64_t batch, int64_t row, int64_t channel) {
  return *reinterpret_cast<const Several<T, N>*>(conv_spot<T>(rows, batch, row, channel));
}
template <class T, int N> __device__ __forceinline__ void conv_write(T* to, const float (&x)[N]) {
  Several<T, N> out;
  if constexpr (N == 1) {
    out.v[0] = from_float<T>(x[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const Pair<T> two = pair_from(x[i], x[i + 1], T());
      out.v[i] = two.v[0], out.v[i + 1] = two.v[1];
    }
  }
  *reinterpret_cast<Several<T, N>*>(to) = out;
}
template <class T, int N>
__device__ __forceinline__ void conv_store(const Rows& rows, int64_t batch, int64_t row, int64_t channel,
                                           const float (&x)[N]) {
  conv_write<T, N>(conv_spot<T>(rows, batch, row, channel), x);
}

// A position of the line `state, then tokens`; zeros where there is nothing.
template <class T, int N>
__device__ __forceinline__ Several<T, N> conv_raw_line(const ConvArguments& p, int64_t batch, int64_t position,
                                                       int64_t channel) {
  const int64_t past = p.taps - 1;
  if (position >= past) return conv_load<T, N>(p.x, batch, position - past, channel);
  if (position >= 0 && p.state.data != nullptr) return conv_load<T, N>(p.state, batch, position, channel);
  return {};
}
template <class T, int N>
__device__ __forceinline__ void conv_line(const ConvArguments& p, int64_t batch, int64_t position, int64_t channel,
                                          float (&out)[N]) {
  const Several<T, N> raw = conv_raw_line<T, N>(p, batch, position, channel);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(raw.v[i]);
}

// Weights and bias of a thread's channels. TAPS are as many as registers hold; the last p.taps of them count.
template <int N, int TAPS>
struct ConvWeights {
  float taps[TAPS][N], bias[N];
  int first;  // tap that counts
  __device__ ConvWeights(const ConvArguments& p, int64_t channel) : first(TAPS == 4 ? 0 : TAPS - int(p.taps)) {
    if (p.weight_dtype == 0) read<float>(p, channel);
    else if (p.weight_dtype == 1) read<bf16>(p, channel);
    else read<fp16>(p, channel);
  }
  template <class W> __device__ __forceinline__ void read(const ConvArguments& p, int64_t channel) {
    const W *weight = static_cast<const W*>(p.weight) + channel * p.taps, *of_bias = static_cast<const W*>(p.bias);
    Several<W, N> of_channels{};
    if (of_bias != nullptr) of_channels = *reinterpret_cast<const Several<W, N>*>(of_bias + channel);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      bias[i] = of_bias != nullptr ? to_float(of_channels.v[i]) : 0.0f;
      if constexpr (TAPS == 4) {
        const Quad<W> four = reinterpret_cast<const Quad<W>*>(weight)[i];
#pragma unroll
        for (int k = 0; k < 4; ++k) taps[k][i] = to_float(four.v[k]);
      } else {
#pragma unroll
        for (int k = 0; k < TAPS; ++k) taps[k][i] = k >= first ? to_float(weight[i * p.taps + k - first]) : 0.0f;
      }
    }
  }
  // 0 times infinity is no 0: a tap that does not count is left out. Four taps are known to count all.
  __device__ bool counts(int k) const { return TAPS == 4 || k >= first; }
};

int conv_backward(const ConvArguments& p);

}  // namespace longllava
