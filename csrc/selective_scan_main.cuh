// The main warps of the scan's forward kernel (selective_scan_forward.cuh).
#pragma once

#include "selective_scan_helper.cuh"

namespace longllava {

// The recurrence over one tile, for PER_THREAD channels and four states of each.
template <class T, int TOKENS, int DEPTH, int PER_THREAD, bool FAST, bool STATES_ONLY>
struct Main {
  using Shared = ForwardShared<T, TOKENS, DEPTH>;
  int lane_group, channel;  // which four states; first channel in the block
  float h[PER_THREAD][4], a[PER_THREAD][4], sum[PER_THREAD];

  __device__ Main(const ScanArguments& p, const Place& at, int id) {
    // Lanes 1 apart share a channel, lanes 2 apart a state: then 16-byte reads of either take two passes, not four.
    const int lane = id % 32;
    lane_group = (lane & 1) | (lane >> 1 & 2);
    const int pair = (lane >> 1 & 1) | (lane >> 2 & 2) | (lane >> 2 & 4);
    channel = (id / 32 * 8 + pair) * PER_THREAD;
    const float* start = STATES_ONLY ? nullptr : p.n_spans > 1 ? p.pieces : p.state;
    if (start != nullptr) start += (at.batch * p.n_spans + at.span) * p.channels * p.states;
#pragma unroll
    for (int c = 0; c < PER_THREAD; ++c) {
      load_states(p.A, at.channel + channel + c, lane_group * 4, p, a[c]);
#pragma unroll
      for (int s = 0; s < 4; ++s) a[c][s] *= LOG2E, h[c][s] = 0.0f;
      if (start != nullptr) load_states(start, at.channel + channel + c, lane_group * 4, p, h[c]);
      sum[c] = 0.0f;
    }
  }

  __device__ void load_steps(const Shared& shared, int buffer, int t, float (&d)[2 * PER_THREAD]) const {
    if (PER_THREAD == 2) {
      const float4 four = *reinterpret_cast<const float4*>(&shared.steps[buffer][t][channel]);
      d[0] = four.x, d[1] = four.y, d[2 * PER_THREAD - 2] = four.z, d[2 * PER_THREAD - 1] = four.w;
    } else {
      const float2 two = shared.steps[buffer][t][channel];
      d[0] = two.x, d[1] = two.y;
    }
  }

  __device__ void advance(Shared& shared, int buffer, uint32_t resets) {
    const float* row = &shared.rows[buffer][0][lane_group * 4];
    float4 b = *reinterpret_cast<const float4*>(row), c = *reinterpret_cast<const float4*>(row + SCAN_STATES);
    float d[2 * PER_THREAD];
    load_steps(shared, buffer, 0, d);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      float4 next_b = b, next_c = c;
      float next_d[2 * PER_THREAD] = {};
      if (t + 1 < TOKENS) {  // asked for a token ahead
        next_b = *reinterpret_cast<const float4*>(row + (t + 1) * 2 * SCAN_STATES);
        next_c = *reinterpret_cast<const float4*>(row + (t + 1) * 2 * SCAN_STATES + SCAN_STATES);
        load_steps(shared, buffer, t + 1, next_d);
      }
      const float bs[4] = {b.x, b.y, b.z, b.w}, cs[4] = {c.x, c.y, c.z, c.w};
      if (!FAST && (resets >> t & 1) != 0) empty();
      float y[PER_THREAD];
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i) {
        y[i] = 0.0f;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          h[i][s] = fmaf(fast_exp2(d[2 * i] * a[i][s]), h[i][s], d[2 * i + 1] * bs[s]);
          y[i] = s == 0 ? h[i][s] * cs[s] : fmaf(h[i][s], cs[s], y[i]);
        }
        if (STATES_ONLY) sum[i] += d[2 * i];
      }
      if (!STATES_ONLY) {
        float* to = &shared.partial[buffer][t][lane_group][channel];
        if (PER_THREAD == 2) *reinterpret_cast<float2*>(to) = make_float2(y[0], y[PER_THREAD - 1]);
        else to[0] = y[0];
      }
      b = next_b, c = next_c;
#pragma unroll
      for (int i = 0; i < 2 * PER_THREAD; ++i) d[i] = next_d[i];
    }
  }

  // NaN in place of a sum of steps says that nothing from before the span comes through.
  __device__ void empty() {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
#pragma unroll
      for (int s = 0; s < 4; ++s) h[i][s] = 0.0f;
      if (STATES_ONLY) sum[i] = NAN;
    }
  }

  __device__ void store_all(float* to, const ScanArguments& p, const Place& at) const {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) store_states(to, at.channel + channel + i, lane_group * 4, p, h[i]);
  }
};

}  // namespace longllava
