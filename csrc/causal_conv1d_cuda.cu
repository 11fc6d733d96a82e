// Entry points of the causal convolution on a GPU, and its forward kernel.
#include "causal_conv1d_cuda.cuh"

namespace longllava {

constexpr int CONV_AHEAD = 2;  // tokens asked for before the first of them is used

// Four blocks a processor, where the window of four taps lets their registers fit, keep enough loads on their way.
template <class T, int N, int TAPS, bool PACKED>
__global__ void __launch_bounds__(CONV_THREADS, TAPS == 4 ? 4 : 1)
conv_forward(const __grid_constant__ ConvArguments p) {
  constexpr int PAST = TAPS - 1;
  const ConvPlace<N, CONV_RUN> at(p, p.length);
  if (!at.exists) return;
  const ConvWeights<N, TAPS> weights(p, at.channel);
  const auto put = [&](float (&y)[N], int64_t t) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (p.silu) y[i] *= conv_sigmoid(y[i]);
    conv_store<T, N>(p.y, at.batch, t, at.channel, y);
  };
  if (PACKED) {
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
      put(y, t);
    }
  } else {
    // window[k] is tap k's input of the token before; the line's positions before its begin do not count
    float window[TAPS][N];
#pragma unroll
    for (int k = 1; k < TAPS; ++k)
      conv_line<T, N>(p, at.batch, at.begin + p.taps - 1 - TAPS + k, at.channel, window[k]);
    Several<T, N> raw[CONV_AHEAD], next[CONV_AHEAD];
    const auto ask = [&](Several<T, N> (&to)[CONV_AHEAD], int64_t t) {
#pragma unroll
      for (int j = 0; j < CONV_AHEAD; ++j)
        if (t + j < at.end) to[j] = conv_load<T, N>(p.x, at.batch, t + j, at.channel);
    };
    ask(next, at.begin);
    for (int64_t t = at.begin; t < at.end; t += CONV_AHEAD) {
#pragma unroll
      for (int j = 0; j < CONV_AHEAD; ++j) raw[j] = next[j];
      ask(next, t + CONV_AHEAD);
#pragma unroll
      for (int j = 0; j < CONV_AHEAD; ++j) {
        if (t + j >= at.end) break;
        float y[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
          for (int k = 0; k < PAST; ++k) window[k][i] = window[k + 1][i];
          window[PAST][i] = to_float(raw[j].v[i]);
          y[i] = weights.bias[i];
#pragma unroll
          for (int k = 0; k < TAPS; ++k)
            if (weights.counts(k)) y[i] = fmaf(weights.taps[k][i], window[k][i], y[i]);
        }
        put(y, t + j);
      }
    }
  }
  if (at.begin != 0) return;
  float kept[CONV_MAX_TAPS - 1][N];  // state_out may be state: all of it is read before any is written
#pragma unroll
  for (int j = 0; j < CONV_MAX_TAPS - 1; ++j)
    if (j < p.taps - 1)
      conv_line<T, N>(p, at.batch, PACKED ? p.last[at.batch * (p.taps - 1) + j] : p.length + j, at.channel, kept[j]);
#pragma unroll
  for (int j = 0; j < CONV_MAX_TAPS - 1; ++j)
    if (j < p.taps - 1) conv_store<T, N>(p.state_out, at.batch, j, at.channel, kept[j]);
}

template <class T, int N, bool PACKED> int conv_forward_with(const ConvArguments& p) {
  const int64_t blocks = conv_blocks<N, CONV_RUN>(p, p.length);
  if (p.taps == 4) return launch(conv_forward<T, N, 4, PACKED>, blocks, CONV_THREADS, 0, p.stream, p);
  return launch(conv_forward<T, N, CONV_MAX_TAPS, PACKED>, blocks, CONV_THREADS, 0, p.stream, p);
}

template <class T> int conv_forward_of(const ConvArguments& p) {
  constexpr int WIDE = 16 / sizeof(T);
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
