// The causal convolution's backward kernel on a GPU, without seq_idx.
//
// A thread owns the tokens of its run. It walks them and the TAPS - 1 tokens after, whose outputs its last inputs
// reach, with the windows of inputs and of gradients in registers.
#include "causal_conv1d_cuda.cuh"

namespace longllava {

template <class T, int N, int TAPS>
__global__ void __launch_bounds__(CONV_THREADS) conv_backward_kernel(const __grid_constant__ ConvArguments p) {
  constexpr int PAST = TAPS - 1;
  const ConvPlace<N, CONV_BACKWARD_RUN> at(p);
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
        const float s = conv_sigmoid(y);
        // far out y times (1 - s) is infinity times 0
        const float slope = s * (1.0f + (s < 1.0f ? y * (1.0f - s) : 0.0f));
        g *= s > 0.0f ? slope : s == s ? 0.0f : s;
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
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t to = at.run * p.channels + at.channel + i;
    p.grad_bias[to] = sum_bias[i];
#pragma unroll
    for (int k = 0; k < TAPS; ++k)
      if (weights.counts(k)) p.grad_weight[to * p.taps + k - weights.first] = sum_weight[k][i];
  }
}

template <class T, int N> int conv_backward_with(const ConvArguments& p) {
  const int64_t blocks = conv_blocks<N, CONV_BACKWARD_RUN>(p);
  if (p.taps == 4) return launch(conv_backward_kernel<T, N, 4>, blocks, CONV_THREADS, 0, p.stream, p);
  return launch(conv_backward_kernel<T, N, CONV_MAX_TAPS>, blocks, CONV_THREADS, 0, p.stream, p);
}

template <class T> int conv_backward_of(const ConvArguments& p) {
  return p.wide ? conv_backward_with<T, 4>(p) : conv_backward_with<T, 1>(p);
}

int conv_backward(const ConvArguments& p) {
  if (p.dtype == 0) return conv_backward_of<float>(p);
  return p.dtype == 1 ? conv_backward_of<bf16>(p) : conv_backward_of<fp16>(p);
}

}  // namespace longllava
