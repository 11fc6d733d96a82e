// The warps of the scan's backward kernel that prepare and finish tiles, a thread two channels of one token.
#pragma once

#include "selective_scan_backward_shared.cuh"

namespace longllava {

// FLAGS: tokens may be padding or begin a sequence. WIDE: channels come in pairs that one load may read.
template <class T, int CHANNELS, bool FLAGS, bool WIDE>
struct Preparer {
  using Shared = BackwardShared<CHANNELS>;
  struct Raw { PairBits<T> u, delta, z, grad; };  // of this thread's token and channels

  const ScanArguments& p;
  const Place& at;
  Shared& shared;
  const int id, pair, t, n_tokens;
  const int64_t channel, row;  // first of two; first row of the span in (B, L)
  const bool exists;           // whether the first does
  const int8_t* flags;         // of the span's tokens, or null
  const bool gated, soft;
  const Tokens<const T> u, delta, z, grad_y, rows;  // from the span's first token, at this thread's channels or state
  const Tokens<T> grad_u, grad_delta, grad_z;
  const Tokens<float> grad_rows;
  const BackLane own;
  BackTile ahead, prepared, walked, finished, asked;
  Raw now, next, after, finishing;
  float row_now, row_next, row_after;  // an element of B or C
  float h[2][4], a[2][4], start[2][4];
  float bias[2], skip[2], sum_D[2] = {}, sum_bias[2] = {};

  __device__ Preparer(const ScanArguments& p, const Place& at, Shared& shared, int id, int n_chunks)
      : p(p), at(at), shared(shared), id(id), pair(id % (CHANNELS / 2)), t(id / (CHANNELS / 2)),
        n_tokens(int(at.end - at.begin)), channel(at.channel + pair * 2),
        row(at.batch * p.length + at.begin), exists(channel < p.channels),
        flags(FLAGS && p.flags != nullptr ? p.flags + row : nullptr), gated(p.z.data != nullptr), soft(p.softplus != 0),
        u(input(p.u, channel)), delta(input(p.delta, channel)), z(input(p.z, channel)),
        grad_y(input(p.grad_y, channel)), rows(input(is_C() ? p.C : p.B, id % SCAN_STATES)),
        grad_u(output(p.grad_u)), grad_delta(output(p.grad_delta)), grad_z(output(p.grad_z)),
        grad_rows((is_C() ? p.grad_C : p.grad_B) +
                      (at.channel / CHANNELS * p.batch * p.length + row) * p.states + id % SCAN_STATES,
                  p.states),
        own(id),
        ahead(BackTile::first_prepared(n_chunks)), prepared(ahead), asked(BackTile::first_walked(n_chunks)) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bias[c] = p.bias != nullptr && channel + c < p.channels ? p.bias[channel + c] : 0.0f;
      skip[c] = p.D != nullptr && channel + c < p.channels ? p.D[channel + c] : 0.0f;
      load_states(p.A, at.channel + own.channel + c, own.group * 4, p, a[c]);
#pragma unroll
      for (int s = 0; s < 4; ++s) a[c][s] *= LOG2E;
    }
    now = load(ahead.token + t), row_now = load_row(ahead.token + id / BACK_OUTPUTS);
    ahead.next_prepared();
    next = load(ahead.token + t), row_next = load_row(ahead.token + id / BACK_OUTPUTS);
  }

  __device__ bool is_C() const { return id % BACK_OUTPUTS >= SCAN_STATES; }
  __device__ Tokens<const T> input(const Rows& rows, int64_t column) const {
    return {static_cast<const T*>(rows.data) + at.batch * rows.batch_stride + at.begin * rows.step + column, rows.step};
  }
  __device__ Tokens<T> output(void* grad) const {
    return {static_cast<T*>(grad) + row * p.channels + channel, p.channels};
  }

  __device__ bool real(int token) const {
    return unsigned(token) < unsigned(n_tokens) && (!FLAGS || flags == nullptr || flags[token] != FLAG_PADDING);
  }

  __device__ PairBits<T> load_pair(const Tokens<const T>& tokens, int token, bool wanted) const {
    PairBits<T> out{};
    if (!wanted) return out;
    const T* from = tokens.at(token);
    if (WIDE) return *reinterpret_cast<const PairBits<T>*>(from);
    const Pair<T> two = {{from[0], channel + 1 < p.channels ? from[1] : from_float<T>(0.0f)}};
    memcpy(&out, &two, sizeof(out));
    return out;
  }

  // Before the span's first token, too, there is nothing: there the last tiles' successors lie.
  __device__ Raw load(int token) const {
    const bool wanted = real(token) && exists;
    return {load_pair(u, token, wanted), load_pair(delta, token, wanted), load_pair(z, token, wanted && gated),
            load_pair(grad_y, token, wanted)};
  }

  // Of a tile's 4 x 32 elements of B and C each thread brings one, or two where a block has fewer threads; the second
  // is fetched when it is put.
  __device__ float load_row(int token) const {
    return id % SCAN_STATES < p.states && real(token) ? to_float(*rows.at(token)) : 0.0f;
  }

  // Steps, inner gradients, B and C of the next tile into shared memory.
  __device__ void prepare() {
    ahead.next_prepared();
    after = load(ahead.token + t);
    row_after = load_row(ahead.token + id / BACK_OUTPUTS);
    const BackTile tile = prepared;
    const float2 u_of = to_floats(now.u), delta_of = to_floats(now.delta), z_of = to_floats(now.z);
    const float2 grad_of = to_floats(now.grad);
    const float z[2] = {z_of.x, z_of.y};
    float d[2] = {delta_of.x + bias[0], delta_of.y + bias[1]}, inner[2] = {grad_of.x, grad_of.y};
    const bool is_real = real(tile.token + t);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (soft) d[c] = softplus(d[c]);
      d[c] = is_real ? d[c] : 0.0f;
      if (gated) inner[c] *= z[c] * sigmoid(z[c]);
    }
    *reinterpret_cast<float4*>(&shared.steps[tile.slot][t][pair * 2]) =
        make_float4(d[0], d[0] * u_of.x, d[1], d[1] * u_of.y);
    *reinterpret_cast<float2*>(&shared.inner[tile.slot][t][pair * 2]) = make_float2(inner[0], inner[1]);
    shared.rows[tile.slot][id / BACK_OUTPUTS][id % BACK_OUTPUTS] = row_now;
#pragma unroll
    for (int k = Shared::WALKERS; k < BACK_TOKENS * BACK_OUTPUTS; k += Shared::WALKERS) {
      const int token = (k + id) / BACK_OUTPUTS;
      shared.rows[tile.slot][token][id % BACK_OUTPUTS] = load_row(tile.token + token);
    }
    if (FLAGS && id < BACK_TOKENS) {
      const int token = tile.token + id;
      shared.resets[tile.slot][id] = token < n_tokens && flags != nullptr && flags[token] == FLAG_RESET;
    }
    if (tile.number == 0) load_start(tile.token);
    now = next, next = after;
    row_now = row_next, row_next = row_after;
    walked = prepared;
    prepared.next_prepared();
  }

  // The state that the forward kernel saved before a chunk.
  __device__ void load_start(int token) {
    const int64_t n_saved = (p.length + SCAN_CHUNK - 1) / SCAN_CHUNK;
    const float* from = p.saved + (at.batch * n_saved + (at.begin + token) / SCAN_CHUNK) * p.channels * p.states;
#pragma unroll
    for (int c = 0; c < 2; ++c) load_states(from, at.channel + own.channel + c, own.group * 4, p, start[c]);
  }

  // Keeps the state before the tile prepared last, and walks on to the next.
  __device__ void walk() {
    const BackTile tile = walked;
    if (tile.number == 0) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int s = 0; s < 4; ++s) h[c][s] = start[c][s];
    }
#pragma unroll
    for (int c = 0; c < 2; ++c)
      shared.states[tile.state_slot][c][id] = make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
    if (tile.number == BACK_TILES - 1) return;
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

  // Asks for what finishing the next tile walked backward will need; it was read when the tile was prepared.
  __device__ void ask() {
    finishing = load(asked.token + t);
    finished = asked;
    asked.next_walked();
  }

  __device__ float2 sum(int buffer, int which) const {
    float2 out = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float2 part = *reinterpret_cast<const float2*>(&shared.sums[buffer][which][t][g][pair * 2]);
      out.x += part.x, out.y += part.y;
    }
    return out;
  }

  // Gradients of the tile asked for last.
  __device__ void finish(int buffer) {
    const BackTile tile = finished;
    const float2 y_sum = sum(buffer, 0), x_sum = sum(buffer, 1), d_sum = sum(buffer, 2);
    const float2 inner_of = *reinterpret_cast<const float2*>(&shared.inner[tile.slot][t][pair * 2]);
    const float4 steps = *reinterpret_cast<const float4*>(&shared.steps[tile.slot][t][pair * 2]);
    const float y[2] = {y_sum.x, y_sum.y}, grad_x[2] = {x_sum.x, x_sum.y}, grad_d[2] = {d_sum.x, d_sum.y};
    const float inner[2] = {inner_of.x, inner_of.y}, d[2] = {steps.x, steps.z};
    const float2 u_of = to_floats(finishing.u), delta_of = to_floats(finishing.delta), z_of = to_floats(finishing.z);
    const float2 grad_of = to_floats(finishing.grad);
    const float us[2] = {u_of.x, u_of.y}, deltas[2] = {delta_of.x, delta_of.y}, zs[2] = {z_of.x, z_of.y};
    const float grads[2] = {grad_of.x, grad_of.y};
    const bool is_real = real(tile.token + t);
    float of_u[2], of_delta[2], of_z[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float u = us[c], z = zs[c];
      of_u[c] = fmaf(grad_x[c], d[c], skip[c] * inner[c]);
      sum_D[c] = fmaf(inner[c], u, sum_D[c]);
      const float s = sigmoid(z);
      of_z[c] = grads[c] * fmaf(skip[c], u, y[c]) * (s * fmaf(z, 1.0f - s, 1.0f));
      of_delta[c] = fmaf(grad_x[c], u, grad_d[c] * (1.0f / LOG2E));  // a holds A log2(e)
      if (soft) of_delta[c] *= sigmoid(deltas[c] + bias[c]);
      if (!is_real) of_u[c] = of_delta[c] = of_z[c] = 0.0f;
      sum_bias[c] += of_delta[c];
    }
    if (tile.token + t < n_tokens) {
      store(grad_u.at(tile.token + t), of_u);
      store(grad_delta.at(tile.token + t), of_delta);
      if (gated) store(grad_z.at(tile.token + t), of_z);
    }
#pragma unroll
    for (int k = 0; k < BACK_TOKENS * BACK_OUTPUTS; k += Shared::WALKERS)
      sum_outputs(tile.token, buffer, (k + id) / BACK_OUTPUTS);
  }

  // The sum over the block's channels of one gradient of B or C, in a fixed order.
  __device__ void sum_outputs(int token, int buffer, int k) {
    const int output = id % BACK_OUTPUTS;
    float parts[4] = {};
#pragma unroll
    for (int lane = 0; lane < Shared::LANES; ++lane)  // every second lane has B and C exchanged: see Walker
      parts[lane % 4] += shared.outputs[buffer][k][lane][output ^ (lane % 2 * SCAN_STATES)];
    if (output % SCAN_STATES < p.states && token + k < n_tokens)
      *grad_rows.at(token + k) = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }

  __device__ void store(T* to, const float (&x)[2]) const {
    const Pair<T> two = pair_from(x[0], x[1], T());
    if constexpr (WIDE) {
      if (exists) *reinterpret_cast<Pair<T>*>(to) = two;
    } else {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (channel + c < p.channels) to[c] = two.v[c];
    }
  }
};

}  // namespace longllava
