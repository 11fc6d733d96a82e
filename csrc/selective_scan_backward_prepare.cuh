// The warps of the scan's backward kernel that prepare and finish tiles, a thread two channels of one token.
#pragma once

#include "selective_scan_backward_shared.cuh"

namespace longllava {

template <class T, int CHANNELS, bool FLAGS>
struct Preparer {
  using Shared = BackwardShared<CHANNELS>;
  struct Raw { Pair<T> u, delta, z, grad; };  // of this thread's token and channels

  const ScanArguments& p;
  const Place& at;
  Shared& shared;
  const int id, pair, t, n_tokens, n_chunks;
  const int64_t channel, row;  // first of two; first row of the span in (B, L)
  const BackLane own;
  Raw now, next, after, finishing;
  float row_now, row_next, row_after;  // an element of B or C
  float h[2][4], a[2][4], start[2][4];
  float bias[2], skip[2], sum_D[2] = {}, sum_bias[2] = {};

  __device__ Preparer(const ScanArguments& p, const Place& at, Shared& shared, int id, int n_chunks)
      : p(p), at(at), shared(shared), id(id), pair(id % (CHANNELS / 2)), t(id / (CHANNELS / 2)),
        n_tokens(int(at.end - at.begin)), n_chunks(n_chunks), channel(at.channel + pair * 2),
        row(at.batch * p.length + at.begin), own(id) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bias[c] = p.bias != nullptr && channel + c < p.channels ? p.bias[channel + c] : 0.0f;
      skip[c] = p.D != nullptr && channel + c < p.channels ? p.D[channel + c] : 0.0f;
      load_states(p.A, at.channel + own.channel + c, own.group * 4, p, a[c]);
#pragma unroll
      for (int s = 0; s < 4; ++s) a[c][s] *= LOG2E;
    }
    now = load(0), next = load(1);
    row_now = load_row_of(0), row_next = load_row_of(1);
  }

  __device__ bool real(int token) const {
    return token < n_tokens && (!FLAGS || p.flags[row + token] != FLAG_PADDING);
  }

  __device__ Pair<T> load_pair(const Rows& rows, int token, bool wanted) const {
    Pair<T> out{};
    if (!wanted || rows.data == nullptr) return out;
    const T* from = static_cast<const T*>(rows.data) + at.batch * rows.batch_stride;
    from += (at.begin + token) * rows.step + channel;
    if (p.wide) {
      if (channel < p.channels) out = *reinterpret_cast<const Pair<T>*>(from);
    } else {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (channel + c < p.channels) out.v[c] = from[c];
    }
    return out;
  }

  __device__ Raw load_token(int token) const {
    const bool wanted = real(token);
    return {load_pair(p.u, token, wanted), load_pair(p.delta, token, wanted), load_pair(p.z, token, wanted),
            load_pair(p.grad_y, token, wanted)};
  }
  __device__ Raw load(int i) const {
    return load_token(i < n_chunks * BACK_TILES ? BackTile::prepared(n_chunks, i).token + t : n_tokens);
  }

  // Of a tile's 4 x 32 elements of B and C each thread brings one, or two where a block has fewer threads; the second
  // is fetched when it is put.
  __device__ float load_row_at(int token, int output) const {
    const Rows& rows = output < SCAN_STATES ? p.B : p.C;
    const int n = output % SCAN_STATES;
    if (n >= p.states || !real(token)) return 0.0f;
    return to_float(
        static_cast<const T*>(rows.data)[at.batch * rows.batch_stride + (at.begin + token) * rows.step + n]);
  }
  __device__ float load_row_of(int i) const {
    if (i >= n_chunks * BACK_TILES) return 0.0f;
    return load_row_at(BackTile::prepared(n_chunks, i).token + id / BACK_OUTPUTS, id % BACK_OUTPUTS);
  }

  __device__ void step_sizes(const Raw& raw, bool is_real, float (&d)[2], float (&plain)[2]) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      plain[c] = to_float(raw.delta.v[c]) + bias[c];
      d[c] = is_real ? (p.softplus ? softplus(plain[c]) : plain[c]) : 0.0f;
    }
  }

  // Steps, inner gradients, B and C of the i-th tile into shared memory.
  __device__ void prepare(int i) {
    after = load(i + 2);
    row_after = load_row_of(i + 2);
    const BackTile tile = BackTile::prepared(n_chunks, i);
    float d[2], plain[2], inner[2];
    step_sizes(now, real(tile.token + t), d, plain);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      inner[c] = to_float(now.grad.v[c]);
      if (p.z.data != nullptr) inner[c] *= to_float(now.z.v[c]) * sigmoid(to_float(now.z.v[c]));
    }
    *reinterpret_cast<float4*>(&shared.steps[tile.slot][t][pair * 2]) =
        make_float4(d[0], d[0] * to_float(now.u.v[0]), d[1], d[1] * to_float(now.u.v[1]));
    *reinterpret_cast<float2*>(&shared.inner[tile.slot][t][pair * 2]) = make_float2(inner[0], inner[1]);
    shared.rows[tile.slot][id / BACK_OUTPUTS][id % BACK_OUTPUTS] = row_now;
#pragma unroll
    for (int k = Shared::WALKERS; k < BACK_TOKENS * BACK_OUTPUTS; k += Shared::WALKERS) {
      const int token = (k + id) / BACK_OUTPUTS;
      shared.rows[tile.slot][token][id % BACK_OUTPUTS] = load_row_at(tile.token + token, id % BACK_OUTPUTS);
    }
    if (FLAGS && id < BACK_TOKENS) {
      const int token = tile.token + id;
      shared.resets[tile.slot][id] = token < n_tokens && p.flags[row + token] == FLAG_RESET;
    }
    if (i % BACK_TILES == 0) load_start(tile.token);
    now = next, next = after;
    row_now = row_next, row_next = row_after;
  }

  // The state that the forward kernel saved before a chunk.
  __device__ void load_start(int token) {
    const int64_t n_saved = (p.length + SCAN_CHUNK - 1) / SCAN_CHUNK;
    const float* from = p.saved + (at.batch * n_saved + (at.begin + token) / SCAN_CHUNK) * p.channels * p.states;
#pragma unroll
    for (int c = 0; c < 2; ++c) load_states(from, at.channel + own.channel + c, own.group * 4, p, start[c]);
  }

  // Keeps the state before the i-th tile, and walks on to the next.
  __device__ void walk(int i) {
    const BackTile tile = BackTile::prepared(n_chunks, i);
    if (i % BACK_TILES == 0) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) h[c][s] = start[c][s];
    }
#pragma unroll
    for (int c = 0; c < 2; ++c)
      shared.states[tile.state_slot][c][id] = make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
    if (i % BACK_TILES == BACK_TILES - 1) return;
#pragma unroll
    for (int k = 0; k < BACK_TOKENS; ++k) {
      const float4 d = *reinterpret_cast<const float4*>(&shared.steps[tile.slot][k][own.channel]);
      const float4 b = *reinterpret_cast<const float4*>(&shared.rows[tile.slot][k][own.group * 4]);
      const float ds[2] = {d.x, d.z}, xs[2] = {d.y, d.w}, bs[4] = {b.x, b.y, b.z, b.w};
      const bool reset = FLAGS && shared.resets[tile.slot][k] != 0;
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s)
          h[c][s] = fmaf(fast_exp2(ds[c] * a[c][s]), reset ? 0.0f : h[c][s], xs[c] * bs[s]);
    }
  }

  // Asks for what finishing the i-th tile walked backward will need; it was read when the tile was prepared.
  __device__ void ask(int i) { finishing = load_token(BackTile::walked(n_chunks, i).token + t); }

  __device__ float2 sum(int buffer, int which) const {
    float2 out = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float2 part = *reinterpret_cast<const float2*>(&shared.sums[buffer][which][t][g][pair * 2]);
      out.x += part.x, out.y += part.y;
    }
    return out;
  }

  // Gradients of the i-th tile walked backward.
  __device__ void finish(int i) {
    const BackTile tile = BackTile::walked(n_chunks, i);
    const int buffer = i & 1;
    const float2 y_sum = sum(buffer, 0), x_sum = sum(buffer, 1), d_sum = sum(buffer, 2);
    const float2 inner_of = *reinterpret_cast<const float2*>(&shared.inner[tile.slot][t][pair * 2]);
    const float4 steps = *reinterpret_cast<const float4*>(&shared.steps[tile.slot][t][pair * 2]);
    const float y[2] = {y_sum.x, y_sum.y}, grad_x[2] = {x_sum.x, x_sum.y}, grad_d[2] = {d_sum.x, d_sum.y};
    const float inner[2] = {inner_of.x, inner_of.y}, d[2] = {steps.x, steps.z};
    const bool is_real = real(tile.token + t);
    float grad_u[2], grad_delta[2], grad_z[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float u = to_float(finishing.u.v[c]), z = to_float(finishing.z.v[c]);
      grad_u[c] = fmaf(grad_x[c], d[c], skip[c] * inner[c]);
      sum_D[c] = fmaf(inner[c], u, sum_D[c]);
      const float s = sigmoid(z);
      grad_z[c] = to_float(finishing.grad.v[c]) * fmaf(skip[c], u, y[c]) * (s * fmaf(z, 1.0f - s, 1.0f));
      grad_delta[c] = fmaf(grad_x[c], u, grad_d[c] * (1.0f / LOG2E));  // a holds A log2(e)
      if (p.softplus) grad_delta[c] *= sigmoid(to_float(finishing.delta.v[c]) + bias[c]);
      if (!is_real) grad_u[c] = grad_delta[c] = grad_z[c] = 0.0f;
      sum_bias[c] += grad_delta[c];
    }
    if (tile.token + t < n_tokens) {
      store(p.grad_u, tile.token + t, grad_u);
      store(p.grad_delta, tile.token + t, grad_delta);
      if (p.grad_z != nullptr) store(p.grad_z, tile.token + t, grad_z);
    }
#pragma unroll
    for (int k = 0; k < BACK_TOKENS * BACK_OUTPUTS; k += Shared::WALKERS) sum_outputs(tile.token, buffer, k + id);
  }

  // The sum over the block's channels of one gradient of B or C, in a fixed order.
  __device__ void sum_outputs(int token, int buffer, int place) {
    const int k = place / BACK_OUTPUTS, output = place % BACK_OUTPUTS, n = output % SCAN_STATES;
    float parts[4] = {};
#pragma unroll
    for (int lane = 0; lane < Shared::LANES; ++lane)  // every second lane has B and C exchanged: see Walker
      parts[lane % 4] += shared.outputs[buffer][k][lane][output ^ (lane % 2 * SCAN_STATES)];
    if (n >= p.states || token + k >= n_tokens) return;
    float* to = output < SCAN_STATES ? p.grad_B : p.grad_C;
    const int64_t block = at.channel / CHANNELS;
    to[(block * p.batch * p.length + row + token + k) * p.states + n] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }

  __device__ void store(void* grad, int token, const float (&x)[2]) const {
    T* to = static_cast<T*>(grad) + (row + token) * p.channels + channel;
    const Pair<T> two = pair_from(x[0], x[1], T());
    if (p.wide) {
      if (channel < p.channels) *reinterpret_cast<Pair<T>*>(to) = two;
      return;
    }
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (channel + c < p.channels) to[c] = two.v[c];
  }
};

}  // namespace longllava
