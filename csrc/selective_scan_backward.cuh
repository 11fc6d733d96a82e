// The scan's backward kernel. A block holds CHANNELS channels and walks one span of time from its end.
//
// As in the forward kernel two kinds of warps work side by side and meet at one barrier a tile of four tokens.
// Preparers turn inputs into steps and inner gradients, compute the states again, from the one saved before a chunk to
// the one before each of its tiles, and finish what walkers leave: sums over lanes and channels, the gradients' last
// factors, stores. Walkers take a tile's states once more, in registers, and then go back through its tokens. Sums over
// channels are taken in a fixed order within the block, and left as one partial sum a block.
#pragma once

#include "selective_scan_backward_prepare.cuh"

namespace longllava {

template <int CHANNELS, bool FLAGS>
struct Walker {
  using Shared = BackwardShared<CHANNELS>;
  Shared& shared;
  const int id;
  const BackLane own;
  BackTile tile;
  float a[2][4], g[2][4], sum_A[2][4];  // A log2(e); gradient of the state; gradient of A

  __device__ Walker(const ScanArguments& p, const Place& at, Shared& shared, int id, int n_chunks)
      : shared(shared), id(id), own(id), tile(BackTile::first_walked(n_chunks)) {
    const float* end = p.n_spans > 1 ? p.pieces : p.grad_end;
    if (end != nullptr) end += (at.batch * p.n_spans + at.span) * p.channels * p.states;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      load_states(p.A, at.channel + own.channel + c, own.group * 4, p, a[c]);
#pragma unroll
      for (int s = 0; s < 4; ++s) a[c][s] *= LOG2E, g[c][s] = sum_A[c][s] = 0.0f;
      if (end != nullptr) load_states(end, at.channel + own.channel + c, own.group * 4, p, g[c]);
    }
  }

  // Lanes a state apart would meet in the same banks: every second one exchanges the places of B and C.
  __device__ void put_outputs(int buffer, int k, int is_C, const float (&x)[4]) {
    const int place = (own.group * 4 + is_C * SCAN_STATES) ^ (own.lane % 2 * SCAN_STATES);
    *reinterpret_cast<float4*>(&shared.outputs[buffer][k][own.lane][place]) = make_float4(x[0], x[1], x[2], x[3]);
  }

  __device__ void put_sums(int buffer, int which, int k, const float (&x)[2]) {
    *reinterpret_cast<float2*>(&shared.sums[buffer][which][k][own.group][own.channel]) = make_float2(x[0], x[1]);
  }

  struct Token { float d[2], x[2], inner[2], b[4], c[4]; };
  __device__ Token token(int slot, int k) const {
    const float4 d = *reinterpret_cast<const float4*>(&shared.steps[slot][k][own.channel]);
    const float2 inner = *reinterpret_cast<const float2*>(&shared.inner[slot][k][own.channel]);
    const float* row = &shared.rows[slot][k][own.group * 4];
    const float4 b = *reinterpret_cast<const float4*>(row), c = *reinterpret_cast<const float4*>(row + SCAN_STATES);
    return {{d.x, d.z}, {d.y, d.w}, {inner.x, inner.y}, {b.x, b.y, b.z, b.w}, {c.x, c.y, c.z, c.w}};
  }

  __device__ void decays(const Token& now, float (&out)[2][4]) const {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int s = 0; s < 4; ++s) out[c][s] = fast_exp2(now.d[c] * a[c][s]);
  }

  // Goes back through the next tile. All that it reads is asked for at once and stays in registers; exponentials are
  // begun a token before they are needed.
  __device__ void walk(int buffer) {
    Token tokens[BACK_TOKENS];
#pragma unroll
    for (int k = 0; k < BACK_TOKENS; ++k) tokens[k] = token(tile.slot, k);
    float before[BACK_TOKENS + 1][2][4], decay[BACK_TOKENS][2][4];
    int resets[BACK_TOKENS] = {};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float4 h = shared.states[tile.state_slot][c][id];
      before[0][c][0] = h.x, before[0][c][1] = h.y, before[0][c][2] = h.z, before[0][c][3] = h.w;
    }
    decays(tokens[0], decay[0]);
#pragma unroll
    for (int k = 0; k < BACK_TOKENS; ++k) {
      const Token& now = tokens[k];
      if (k + 1 < BACK_TOKENS) decays(tokens[k + 1], decay[k + 1]);
      if (FLAGS) resets[k] = shared.resets[tile.slot][k];
      float y[2] = {}, grad_C[4] = {};
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          if (FLAGS && resets[k] != 0) before[k][c][s] = 0.0f;
          const float h = fmaf(decay[k][c][s], before[k][c][s], now.x[c] * now.b[s]);
          before[k + 1][c][s] = h;
          y[c] = fmaf(h, now.c[s], y[c]);
          grad_C[s] = fmaf(h, now.inner[c], grad_C[s]);
        }
      put_sums(buffer, 0, k, y);
      put_outputs(buffer, k, 1, grad_C);
    }
#pragma unroll
    for (int k = BACK_TOKENS - 1; k >= 0; --k) {
      const Token& now = tokens[k];
      float grad_x[2] = {}, grad_d[2] = {}, grad_B[4] = {};
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          g[c][s] = fmaf(now.c[s], now.inner[c], g[c][s]);
          grad_x[c] = fmaf(g[c][s], now.b[s], grad_x[c]);
          grad_B[s] = fmaf(g[c][s], now.x[c], grad_B[s]);
          g[c][s] *= decay[k][c][s];
          const float through = g[c][s] * before[k][c][s];
          grad_d[c] = fmaf(through, a[c][s], grad_d[c]);
          sum_A[c][s] = fmaf(through, now.d[c], sum_A[c][s]);
          if (FLAGS && resets[k] != 0) g[c][s] = 0.0f;
        }
      put_sums(buffer, 1, k, grad_x);
      put_sums(buffer, 2, k, grad_d);
      put_outputs(buffer, k, 0, grad_B);
    }
    tile.next_walked();
  }

  __device__ void store(const ScanArguments& p, const Place& at) const {
    const int64_t one_state = p.channels * p.states;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t channel = at.channel + own.channel + c;
      store_states(p.grad_A + (at.batch * p.n_spans + at.span) * one_state, channel, own.group * 4, p, sum_A[c]);
      if (at.span == 0) store_states(p.grad_start + at.batch * one_state, channel, own.group * 4, p, g[c]);
    }
  }
};

template <class T, int CHANNELS, bool FLAGS, bool WIDE>
__global__ void __launch_bounds__(CHANNELS * 4, 1) scan_backward(const __grid_constant__ ScanArguments p) {
  using Shared = BackwardShared<CHANNELS>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Place at(p, CHANNELS);
  const int n_chunks = static_cast<int>((at.end - at.begin + SCAN_CHUNK - 1) / SCAN_CHUNK);
  const int n_tiles = n_chunks * BACK_TILES;
  const int id = threadIdx.x % Shared::WALKERS;
  if (threadIdx.x < Shared::WALKERS) {
    Preparer<T, CHANNELS, FLAGS, WIDE> preparer(p, at, shared, id, n_chunks);
    for (int i = 0; i <= n_tiles + BACK_DELAY; ++i) {
      if (i >= 1 && i <= n_tiles) preparer.walk();
      if (i < n_tiles) preparer.prepare();
      if (i > BACK_DELAY) preparer.finish(i & 1);
      if (i >= BACK_DELAY && i < n_tiles + BACK_DELAY) preparer.ask();
      meet<CHANNELS * 4>();
    }
    // what each of the four threads of a channel pair has added up
    float* sums = &shared.sums[0][0][0][0][0];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      sums[(0 + preparer.t) * CHANNELS + preparer.pair * 2 + c] = preparer.sum_D[c];
      sums[(BACK_TOKENS + preparer.t) * CHANNELS + preparer.pair * 2 + c] = preparer.sum_bias[c];
    }
  } else {
    Walker<CHANNELS, FLAGS> walker(p, at, shared, id, n_chunks);
    for (int i = 0; i <= n_tiles + BACK_DELAY; ++i) {
      if (i >= BACK_DELAY && i < n_tiles + BACK_DELAY) walker.walk((i + 1) & 1);
      meet<CHANNELS * 4>();
    }
    walker.store(p, at);
  }
  meet<CHANNELS * 4>();
  if (threadIdx.x >= CHANNELS || at.channel + threadIdx.x >= p.channels) return;
  const float* sums = &shared.sums[0][0][0][0][threadIdx.x];
  const int64_t to = (at.batch * p.n_spans + at.span) * p.channels + at.channel + threadIdx.x;
  const auto total = [&](int first) {
    return (sums[first * CHANNELS] + sums[(first + 1) * CHANNELS]) +
           (sums[(first + 2) * CHANNELS] + sums[(first + 3) * CHANNELS]);
  };
  if (p.grad_D != nullptr) p.grad_D[to] = total(0);
  if (p.grad_bias != nullptr) p.grad_bias[to] = total(BACK_TOKENS);
}

}  // namespace longllava
