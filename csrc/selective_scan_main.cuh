// The main warps of the scan's forward kernel (selective_scan_forward.cuh).
#pragma once

#include "selective_scan_helper.cuh"

namespace longllava {

// The recurrence over one tile, for PER_THREAD channels and four states of each.
template <class T, int TOKENS, int DEPTH, int PER_THREAD, bool FAST, bool STATES_ONLY>
struct Main {
  using Shared = ForwardShared<T, TOKENS, DEPTH>;
  static constexpr int GROUP = 4, PLACES = SCAN_AHEAD * TOKENS;
  int lane_group, channel;  // which four states; first channel in the block
  int place = 0;            // of the next token in the ring
  float h[PER_THREAD][4], a[PER_THREAD][4], sum[PER_THREAD];
  float4 b, c;                                                              // of the next token
  float x[PER_THREAD], d[GROUP][PER_THREAD], decay[GROUP][PER_THREAD][4];  // d of the group after the next

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

  // This thread's channels of a token, from the ring of tiles of d or x.
  using Ring = float[SCAN_AHEAD][TOKENS][SCAN_CHANNELS];
  __device__ void load(const Ring& ring, int place, float (&out)[PER_THREAD]) const {
    const float* from = &ring[0][0][0] + place * SCAN_CHANNELS + channel;
    if (PER_THREAD == 2) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      out[0] = two.x, out[PER_THREAD - 1] = two.y;
    } else {
      out[0] = from[0];
    }
  }

  __device__ float4 row(const Shared& shared, int place, int is_C) const {
    return *reinterpret_cast<const float4*>(&shared.rows[0][0][0] + (place * 2 + is_C) * SCAN_STATES + lane_group * 4);
  }

  __device__ static int wrapped(int place) { return place >= PLACES ? place - PLACES : place; }

  // Before the first tile, when it and the next are there.
  __device__ void begin(const Shared& shared) {
    b = row(shared, 0, 0), c = row(shared, 0, 1);
    load(shared.x, 0, x);
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
      load(shared.d, t, d[t]);
#pragma unroll
      for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
        for (int s = 0; s < 4; ++s) decay[t][i][s] = fast_exp2(d[t][i] * a[i][s]);
      load(shared.d, GROUP + t, d[t]);
    }
  }

  // A tile. The decays of GROUP tokens are computed while the GROUP before is worked on, also into the next tile, and
  // handed over through the end of a loop that is not unrolled: else the compiler puts each exponential just before its
  // use, and a lone warp waits for it. Steps are loaded two groups ahead, the rest one token.
  __device__ void advance(Shared& shared, int buffer, uint32_t resets) {
#pragma unroll 1
    for (int group = 0; group < TOKENS / GROUP; ++group) {
      const int next = wrapped(place + GROUP), after = wrapped(next + GROUP);
#pragma unroll
      for (int t = 0; t < GROUP; ++t) {
        const int token = group * GROUP + t, following = t + 1 < GROUP ? place + t + 1 : next;
        const float4 next_b = row(shared, following, 0), next_c = row(shared, following, 1);
        float next_x[PER_THREAD];
        load(shared.x, following, next_x);
        if (!FAST && (resets >> token & 1) != 0) empty();
        if (STATES_ONLY) add_steps(shared, place + t);
        const float bs[4] = {b.x, b.y, b.z, b.w}, cs[4] = {c.x, c.y, c.z, c.w};
        float y[PER_THREAD];
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
          for (int i = 0; i < PER_THREAD; ++i) {
            h[i][s] = fmaf(decay[t][i][s], h[i][s], x[i] * bs[s]);
            decay[t][i][s] = fast_exp2(d[t][i] * a[i][s]);
            y[i] = s == 0 ? h[i][s] * cs[s] : fmaf(h[i][s], cs[s], y[i]);
          }
        }
        load(shared.d, after + t, d[t]);
        if (!STATES_ONLY) {
          float* to = &shared.partial[buffer][token][lane_group][channel];
          if (PER_THREAD == 2) *reinterpret_cast<float2*>(to) = make_float2(y[0], y[PER_THREAD - 1]);
          else to[0] = y[0];
        }
        b = next_b, c = next_c;
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) x[i] = next_x[i];
      }
      place = next;
    }
  }

  __device__ void add_steps(const Shared& shared, int at) {
    float now[PER_THREAD];
    load(shared.d, at, now);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum[i] += now[i];
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
