// The causal convolution's backward kernels on a GPU.
//
// Without seq_idx a thread owns the tokens of its run. It walks them and the TAPS - 1 tokens after, whose outputs its
// last inputs reach, with the windows of inputs and of gradients in registers. With seq_idx the tokens that read an
// input may lie anywhere behind it: one kernel writes the gradient of each token's sum, a second one gathers, for each
// position of the line `state, then tokens`, those of its readers.
#include "causal_conv1d_cuda.cuh"

namespace longllava {

// The gradient of a token's sum from that of its output.
__device__ __forceinline__ float conv_slope(float grad, float sum) {
  const float s = conv_sigmoid(sum);
  // far out y times (1 - s) is infinity times 0
  const float slope = s * (1.0f + (s < 1.0f ? sum * (1.0f - s) : 0.0f));
  return grad * (s > 0.0f ? slope : s == s ? 0.0f : s);
}

// Partial sums of a run of tokens.
template <int N, int TAPS>
__device__ __forceinline__ void conv_store_sums(const ConvArguments& p, const ConvWeights<N, TAPS>& weights,
                                                int64_t run, int64_t channel, const float (&sum_weight)[TAPS][N],
                                                const float (&sum_bias)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t to = run * p.channels + channel + i;
    p.grad_bias[to] = sum_bias[i];
#pragma unroll
    for (int k = 0; k < TAPS; ++k)
      if (weights.counts(k)) p.grad_weight[to * p.taps + k - weights.first] = sum_weight[k][i];
  }
}

template <class T, int N, int TAPS>
__global__ void __launch_bounds__(CONV_THREADS) conv_backward_kernel(const __grid_constant__ ConvArguments p) {
  constexpr int PAST = TAPS - 1;
  const ConvPlace<N, CONV_BACKWARD_RUN> at(p, p.length);
  if (!at.exists) return;
  const ConvWeights<N, TAPS> weights(p, at.channel);
  const int64_t past = p.taps - 1;
  float window[TAPS][N], grads[TAPS][N] = {};  // grads[k]: of the sum of the token k before this one
  float sum_weight[TAPS][N] = {}, sum_bias[N] = {};
#pragma unroll
  for (int k = 1; k < TAPS; ++k) conv_line<T, N>(p, at.batch, at.begin + past - TAPS + k, at.channel, window[k]);
  for (int64_t t = at.begin; t < at.end + PAST; ++t) {
    Several<T, N> x{}, grad{};
    if (t < p.length) {
      x = conv_load<T, N>(p.x, at.batch, t, at.channel);
      grad = conv_load<T, N>(p.grad_y, at.batch, t, at.channel);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int k = 0; k < PAST; ++k) window[k][i] = window[k + 1][i];
#pragma unroll
      for (int k = PAST; k > 0; --k) grads[k][i] = grads[k - 1][i];
      window[PAST][i] = to_float(x.v[i]);
      float g = to_float(grad.v[i]);
      if (p.silu) {
        float y = weights.bias[i];
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
          if (weights.counts(k)) y = fmaf(weights.taps[k][i], window[k][i], y);
        g = conv_slope(g, y);
      }
      grads[0][i] = t < p.length ? g : 0.0f;
      if (t < at.end) {
        sum_bias[i] += g;
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
          if (weights.counts(k)) sum_weight[k][i] = fmaf(g, window[k][i], sum_weight[k][i]);
      }
    }
    const int64_t q = t - PAST;  // its last reader is t, or one before; below 0 are the rows of the state
    if (q < (at.begin == 0 ? -past : at.begin)) continue;
    float out[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = 0.0f;
#pragma unroll
      for (int k = 0; k < TAPS; ++k)  // token t - k reads q by its tap k
        if (weights.counts(k)) out[i] = fmaf(weights.taps[k][i], grads[k][i], out[i]);
    }
    const int64_t kept = q - (p.length - past);  // its place in the final state
    if (kept >= 0 && p.grad_state.data != nullptr) {
      const Several<T, N> more = conv_load<T, N>(p.grad_state, at.batch, kept, at.channel);
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] += to_float(more.v[i]);
    }
    if (q >= 0) conv_store<T, N>(p.grad_x, at.batch, q, at.channel, out);
    else conv_store<T, N>(p.grad_start, at.batch, q + past, at.channel, out);
  }
  conv_store_sums(p, weights, at.run, at.channel, sum_weight, sum_bias);
}

__device__ __forceinline__ Rows conv_grad_sums(const ConvArguments& p) {
  return {p.grad_sums, p.length * p.channels, p.channels};
}

template <class T, int N, int TAPS>
__global__ void __launch_bounds__(CONV_THREADS) conv_backward_sums(const __grid_constant__ ConvArguments p) {
  const ConvPlace<N, CONV_BACKWARD_RUN> at(p, p.length);
  if (!at.exists) return;
  const ConvWeights<N, TAPS> weights(p, at.channel);
  float sum_weight[TAPS][N] = {}, sum_bias[N] = {};
  for (int64_t t = at.begin; t < at.end; ++t) {
    const int32_t* sources = p.sources + (at.batch * p.length + t) * p.taps - weights.first;
    float window[TAPS][N] = {}, g[N] = {};
    if (sources[TAPS - 1] >= 0) {  // padding has no output, and nothing that stands there is read
      const Several<T, N> grad = conv_load<T, N>(p.grad_y, at.batch, t, at.channel);
#pragma unroll
      for (int k = 0; k < TAPS; ++k)
        if (weights.counts(k)) conv_line<T, N>(p, at.batch, sources[k], at.channel, window[k]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        g[i] = to_float(grad.v[i]);
        if (p.silu) {
          float y = weights.bias[i];
#pragma unroll
          for (int k = 0; k < TAPS; ++k)
            if (weights.counts(k)) y = fmaf(weights.taps[k][i], window[k][i], y);
          g[i] = conv_slope(g[i], y);
        }
        sum_bias[i] += g[i];
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
          if (weights.counts(k)) sum_weight[k][i] = fmaf(g[i], window[k][i], sum_weight[k][i]);
      }
    }
    conv_store<float, N>(conv_grad_sums(p), at.batch, t, at.channel, g);
  }
  conv_store_sums(p, weights, at.run, at.channel, sum_weight, sum_bias);
}

template <class T, int N, int TAPS>
__global__ void __launch_bounds__(CONV_THREADS) conv_backward_line(const __grid_constant__ ConvArguments p) {
  const int64_t past = p.taps - 1, n_line = p.length + past;
  const ConvPlace<N, CONV_BACKWARD_RUN> at(p, n_line);
  if (!at.exists) return;
  const ConvWeights<N, TAPS> weights(p, at.channel);
  for (int64_t q = at.begin; q < at.end; ++q) {
    const int32_t* users = p.users + (at.batch * n_line + q) * p.taps - weights.first;
    float out[N] = {};
#pragma unroll
    for (int k = 0; k < TAPS; ++k) {
      if (!weights.counts(k) || users[k] < 0) continue;
      const Several<float, N> g = conv_load<float, N>(conv_grad_sums(p), at.batch, users[k], at.channel);
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = fmaf(weights.taps[k][i], g.v[i], out[i]);
    }
    for (int64_t j = 0; p.grad_state.data != nullptr && j < past; ++j) {
      if (p.last[at.batch * past + j] != q) continue;
      const Several<T, N> more = conv_load<T, N>(p.grad_state, at.batch, j, at.channel);
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] += to_float(more.v[i]);
    }
    if (q >= past) conv_store<T, N>(p.grad_x, at.batch, q - past, at.channel, out);
    else conv_store<T, N>(p.grad_start, at.batch, q, at.channel, out);
  }
}

template <class T, int N, int TAPS> int conv_backward_as(const ConvArguments& p) {
  constexpr int RUN = CONV_BACKWARD_RUN;
  if (p.sources == nullptr) return conv_launch<N, RUN>(conv_backward_kernel<T, N, TAPS>, p, p.length);
  const int error = conv_launch<N, RUN>(conv_backward_sums<T, N, TAPS>, p, p.length);
  if (error != 0) return error;
  return conv_launch<N, RUN>(conv_backward_line<T, N, TAPS>, p, p.length + p.taps - 1);
}

template <class T, int N> int conv_backward_with(const ConvArguments& p) {
  return p.taps == 4 ? conv_backward_as<T, N, 4>(p) : conv_backward_as<T, N, CONV_MAX_TAPS>(p);
}

template <class T> int conv_backward_of(const ConvArguments& p) {
  return p.wide ? conv_backward_with<T, 4>(p) : conv_backward_with<T, 1>(p);
}

int conv_backward(const ConvArguments& p) {
  if (p.dtype == 0) return conv_backward_of<float>(p);
  return p.dtype == 1 ? conv_backward_of<bf16>(p) : conv_backward_of<fp16>(p);
}

}  // namespace longllava
