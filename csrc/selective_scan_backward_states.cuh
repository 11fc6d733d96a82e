// What each span of time adds to the gradient of the state before it, and its sum of steps: for scan_join.
//
// For widths too small to fill a GPU only, so it is plain: four lanes hold a channel and do its softplus and gate four
// times over. The next tokens are asked for ahead.
#pragma once

#include "selective_scan_cuda.cuh"

namespace longllava {

constexpr int PIECE_THREADS = 128, PIECE_CHANNELS = PIECE_THREADS / 4;

template <class T>
__global__ void __launch_bounds__(PIECE_THREADS) scan_backward_states(const __grid_constant__ ScanArguments p) {
  const Place at(p, PIECE_CHANNELS);
  const int64_t channel = at.channel + threadIdx.x / 4;
  const int first = threadIdx.x % 4 * 4;
  const bool exists = channel < p.channels;
  const float bias = exists && p.bias != nullptr ? p.bias[channel] : 0.0f;
  const auto element = [&](const Rows& rows, int64_t t, bool wanted) {
    if (!wanted || rows.data == nullptr) return 0.0f;
    return to_float(static_cast<const T*>(rows.data)[at.batch * rows.batch_stride + t * rows.step + channel]);
  };
  struct Token { float delta, z, grad; Quad<T> c; bool real, reset; };
  const auto load = [&](int64_t t) {
    int8_t flag = t < at.begin ? FLAG_PADDING : FLAG_PLAIN;
    if (p.flags != nullptr && t >= at.begin) flag = p.flags[at.batch * p.length + t];
    const bool real = flag != FLAG_PADDING, wanted = real && exists;
    const T* row = static_cast<const T*>(p.C.data) + at.batch * p.C.batch_stride + t * p.C.step;
    return Token{element(p.delta, t, wanted), element(p.z, t, wanted), element(p.grad_y, t, wanted),
                 load_row(row, first, real, p.wide != 0, p.states), real, flag == FLAG_RESET};
  };
  float a[4], g[4] = {}, sum = 0.0f;
  load_states(p.A, channel, first, p, a);
#pragma unroll
  for (int s = 0; s < 4; ++s) a[s] *= LOG2E;
  constexpr int AHEAD = 4;
  Token ahead[AHEAD];
#pragma unroll
  for (int k = 0; k < AHEAD; ++k) ahead[k] = load(at.end - 1 - k);
  for (int64_t t = at.end - 1; t >= at.begin; t -= AHEAD) {
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const Token now = ahead[k];
      ahead[k] = load(t - k - AHEAD);
      float d = now.delta + bias;
      if (p.softplus) d = softplus(d);
      d = now.real ? d : 0.0f;
      const float inner = p.z.data != nullptr ? now.grad * now.z * sigmoid(now.z) : now.grad;
#pragma unroll
      for (int s = 0; s < 4; ++s) g[s] = fast_exp2(d * a[s]) * fmaf(to_float(now.c.v[s]), inner, g[s]);
      sum += d;
      if (now.reset) {  // nothing from after it reaches what is before; NaN says so to scan_join
#pragma unroll
        for (int s = 0; s < 4; ++s) g[s] = 0.0f;
        sum = NAN;
      }
    }
  }
  const int64_t span = at.batch * p.n_spans + at.span;
  store_states(p.pieces + span * p.channels * p.states, channel, first, p, g);
  if (first == 0 && exists) p.sums[span * p.channels + channel] = sum;
}

}  // namespace longllava
