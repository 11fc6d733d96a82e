// Entry points of the causal convolution on a GPU, and its forward kernel.
#include "causal_conv1d_cuda.cuh"

namespace longllava {

constexpr int CONV_AHEAD = 4;  // tokens asked for before the first of them is used; as many again are on their way

template <class T, int N>
__device__ __forceinline__ void conv_finish(T* to, float (&y)[N], bool silu) {
  if (silu) {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] *= conv_sigmoid(y[i]);
  }
  conv_write<T, N>(to, y);
}

// The tokens begin .. end - 1, which are all there (WHOLE: CONV_RUN of them). Rows stay as they lie in memory: half of the
// registers, and a bf16 becomes a float in one instruction.
template <class T, int N, int TAPS, bool WHOLE>
__device__ __forceinline__ void conv_walk(const ConvArguments& p, const ConvPlace<N, CONV_RUN>& at,
                                          const ConvWeights<N, TAPS>& weights) {
  constexpr int PAST = TAPS - 1, AHEAD = CONV_AHEAD;
  static_assert(CONV_RUN % AHEAD == 0, "a whole run is a number of steps");
  Several<T, N> line[PAST + AHEAD], next[AHEAD];  // line[j + k]: what tap k of a step's token j reads
  const T* x = static_cast<const T*>(p.x.data) + at.batch * p.x.batch_stride + at.begin * p.x.step + at.channel;
  T* y = static_cast<T*>(p.y.data) + at.batch * p.y.batch_stride + at.begin * p.y.step + at.channel;
  const int count = WHOLE ? CONV_RUN : int(at.end - at.begin);
  const auto ask = [&](int from) {
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if ((WHOLE ? from : from + j) < count) next[j] = *reinterpret_cast<const Several<T, N>*>(x + j * p.x.step);
    x += AHEAD * p.x.step;
  };
  ask(0);
#pragma unroll
  for (int k = 0; k < PAST; ++k)
    line[k] = conv_raw_line<T, N>(p, at.batch, at.begin + p.taps - 1 - PAST + k, at.channel);
#pragma unroll 1
  for (int t = 0; t < count; t += AHEAD) {
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) line[PAST + j] = next[j];
    ask(t + AHEAD);
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      if (WHOLE || t + j < count) {
        float sum[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[i] = weights.bias[i];
#pragma unroll
          for (int k = 0; k < TAPS; ++k)
            if (weights.counts(k)) sum[i] = fmaf(weights.taps[k][i], to_float(line[j + k].v[i]), sum[i]);
        }
        conv_finish<T, N>(y, sum, p.silu);
      }
      y += p.y.step;
    }
#pragma unroll
    for (int k = 0; k < PAST; ++k) line[k] = line[k + AHEAD];
  }
}

// With seq_idx, where each tap's token is told by a table.
template <class T, int N, int TAPS>
__device__ __forceinline__ void conv_gather(const ConvArguments& p, const ConvPlace<N, CONV_RUN>& at,
                                            const ConvWeights<N, TAPS>& weights) {
  for (int64_t t = at.begin; t < at.end; ++t) {
    const int32_t* sources = p.sources + (at.batch * p.length + t) * p.taps - weights.first;
    float y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = weights.bias[i];
#pragma unroll
    for (int k = 0; k < TAPS; ++k) {
      if (!weights.counts(k)) continue;
      float x[N];
      conv_line<T, N>(p, at.batch, sources[k], at.channel, x);
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = fmaf(weights.taps[k][i], x[i], y[i]);
    }
    if (sources[TAPS - 1] < 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = 0.0f;
    }
    conv_finish<T, N>(conv_spot<T>(p.y, at.batch, t, at.channel), y, p.silu);
  }
}

// Six blocks a processor, where the window of four taps lets their registers fit, keep enough loads on their way.
template <class T, int N, int TAPS, bool PACKED>
__global__ void __launch_bounds__(CONV_THREADS, TAPS == 4 ? 6 : 1)
conv_forward(const __grid_constant__ ConvArguments p) {
  const ConvPlace<N, CONV_RUN> at(p, p.length);
  if (!at.exists) return;
  const ConvWeights<N, TAPS> weights(p, at.channel);
  if constexpr (PACKED) conv_gather<T, N, TAPS>(p, at, weights);
  else if (at.end - at.begin == CONV_RUN) conv_walk<T, N, TAPS, true>(p, at, weights);
  else conv_walk<T, N, TAPS, false>(p, at, weights);
  if (at.begin != 0) return;
  Several<T, N> kept[CONV_MAX_TAPS - 1];  // state_out may be state: all of it is read before any is written
#pragma unroll
  for (int j = 0; j < CONV_MAX_TAPS - 1; ++j)
    if (j < p.taps - 1)
      kept[j] = conv_raw_line<T, N>(p, at.batch, PACKED ? p.last[at.batch * (p.taps - 1) + j] : p.length + j,
                                    at.channel);
#pragma unroll
  for (int j = 0; j < CONV_MAX_TAPS - 1; ++j)
    if (j < p.taps - 1)
      *reinterpret_cast<Several<T, N>*>(conv_spot<T>(p.state_out, at.batch, j, at.channel)) = kept[j];
}

template <class T, int N, bool PACKED> int conv_forward_with(const ConvArguments& p) {
  if (p.taps == 4) return conv_launch<N, CONV_RUN>(conv_forward<T, N, 4, PACKED>, p, p.length);
  return conv_launch<N, CONV_RUN>(conv_forward<T, N, CONV_MAX_TAPS, PACKED>, p, p.length);
}

template <class T> int conv_forward_of(const ConvArguments& p) {
  // With 16 bytes, whose registers left room for fewer threads, runs of 64 and two tokens ahead, a prompt took an H100
  // 7% longer, 459 us and not 428; with 16 and four ahead 450 (benchmarks/results/kernel-variants-h100.json).
  constexpr int WIDE = 8 / sizeof(T);
  if (p.wide) return p.sources ? conv_forward_with<T, WIDE, true>(p) : conv_forward_with<T, WIDE, false>(p);
  return p.sources ? conv_forward_with<T, 1, true>(p) : conv_forward_with<T, 1, false>(p);
}

}  // namespace longllava

using namespace longllava;

// Both return 0, or CUDA's error code, or -1 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_cuda_conv_forward(const ConvArguments* args) {
  if (args->bytes != sizeof(ConvArguments)) return -1;
  const ConvArguments& p = *args;
  return p.dtype == 0 ? conv_forward_of<float>(p) : p.dtype == 1 ? conv_forward_of<bf16>(p) : conv_forward_of<fp16>(p);
}

LONGLLAVA_EXPORT int longllava_cuda_conv_backward(const ConvArguments* args) {
  return args->bytes == sizeof(ConvArguments) ? conv_backward(*args) : -1;
}
