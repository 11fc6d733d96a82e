// The main warps of the scan's forward kernel (selective_scan_forward.cuh).
#pragma once

#include "selective_scan_helper.cuh"

namespace longllava {

// The recurrence over one tile, for a channel and four states of it. Two such warps a scheduler fill the gaps that each
// other's exponentials leave: one with two channels a thread took an H100 25% longer, unrolled, and 7% as a loop.
template <class T, int TOKENS, int DEPTH, bool FAST, bool STATES_ONLY>
struct Main {
  using Shared = ForwardShared<T, TOKENS, DEPTH>;
  static constexpr int GROUPS = Shared::GROUPS;
  int lane_group, row, channel;  // which four states; row in shared memory and channel, of the block
  float h[4], a[4], sum = 0.0f;
  float4 b, c;          // of the next token
  float x[SCAN_GROUP];  // of the group
  float d[SCAN_GROUP], decay[SCAN_GROUP][4];  // d of the group after

  __device__ Main(const ScanArguments& p, const Place& at, int id) {
    // Lanes 1 apart share a channel, lanes 2 apart a state: then 16-byte reads of either take two passes, not four.
    const int lane = id % 32;
    lane_group = (lane & 1) | (lane >> 1 & 2);
    row = id / 32 * 8 + ((lane >> 1 & 1) | (lane >> 2 & 2) | (lane >> 2 & 4));
    channel = channel_of_row(row);
#pragma unroll
    for (int s = 0; s < 4; ++s) h[s] = 0.0f;
    const float* start = STATES_ONLY ? nullptr : p.n_spans > 1 ? p.pieces : p.state;
    if (start != nullptr) {
      start += (at.batch * p.n_spans + at.span) * p.channels * p.states;
      load_states(start, at.channel + channel, lane_group * 4, p, h);
    }
    load_states(p.A, at.channel + channel, lane_group * 4, p, a);
#pragma unroll
    for (int s = 0; s < 4; ++s) a[s] *= LOG2E;
  }

  // Two tokens of this thread's channel, from the ring of groups of d or x.
  using Ring = float[SCAN_AHEAD * GROUPS][SCAN_CHANNELS][SCAN_GROUP];
  __device__ void load_two(const Ring& ring, int place, int t, float (&out)[SCAN_GROUP]) const {
    const float2 two = *reinterpret_cast<const float2*>(&ring[place][row][t]);
    out[t] = two.x, out[t + 1] = two.y;
  }

  __device__ float4 states_of(const Shared& shared, int token, int is_C) const {
    return *reinterpret_cast<const float4*>(&shared.rows[0][0][0] + (token * 2 + is_C) * SCAN_STATES + lane_group * 4);
  }

  // Before the first tile, when it and the next are there.
  __device__ void begin(const Shared& shared) {
    b = states_of(shared, 0, 0), c = states_of(shared, 0, 1);
#pragma unroll
    for (int t = 0; t < SCAN_GROUP; t += 2) load_two(shared.d, 0, t, d), load_two(shared.x, 0, t, x);
#pragma unroll
    for (int t = 0; t < SCAN_GROUP; ++t)
#pragma unroll
      for (int s = 0; s < 4; ++s) decay[t][s] = fast_exp2(d[t] * a[s]);
#pragma unroll
    for (int t = 0; t < SCAN_GROUP; t += 2) load_two(shared.d, 1, t, d);
  }

  // A tile, with the next one in place. Of the groups all but two find what they load ahead in this tile. Unrolled, so
  // that no address is computed: 2.10 ms where the loop took 2.26, 36,000 tokens of 8,192 channels on an H100
  // (benchmarks/results/kernel-variants-h100.json).
  __device__ void advance(Shared& shared, int tile, int buffer, uint32_t resets) {
    const int place = tile * GROUPS, following = (tile + 1 == SCAN_AHEAD ? 0 : tile + 1) * GROUPS;
#pragma unroll
    for (int group = 0; group < GROUPS - 2; ++group)
      advance_group(shared, group, place + group, place + group + 1, place + group + 2, buffer, resets);
    advance_group(shared, GROUPS - 2, place + GROUPS - 2, place + GROUPS - 1, following, buffer, resets);
    advance_group(shared, GROUPS - 1, place + GROUPS - 1, following, following + 1, buffer, resets);
  }

  // A group of tokens. The decays of the next are computed meanwhile, from steps that were loaded a group earlier; the
  // rest is loaded one token ahead, or two.
  __device__ __forceinline__ void advance_group(Shared& shared, int group, int place, int next, int after, int buffer,
                                                uint32_t resets) {
    float y[SCAN_GROUP];
#pragma unroll
    for (int t = 0; t < SCAN_GROUP; ++t) {
      const int token = (t + 1 < SCAN_GROUP ? place : next) * SCAN_GROUP + (t + 1) % SCAN_GROUP;  // the next
      const float4 next_b = states_of(shared, token, 0), next_c = states_of(shared, token, 1);
      if (!FAST && (resets >> (group * SCAN_GROUP + t) & 1) != 0) empty();
      if (STATES_ONLY) sum += shared.d[place][row][t];
      const float bs[4] = {b.x, b.y, b.z, b.w}, cs[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        h[s] = fmaf(decay[t][s], h[s], x[t] * bs[s]);
        decay[t][s] = fast_exp2(d[t] * a[s]);
        y[t] = s == 0 ? h[s] * cs[s] : fmaf(h[s], cs[s], y[t]);
      }
      if (t % 2 == 1) load_two(shared.d, after, t - 1, d), load_two(shared.x, next, t - 1, x);
      b = next_b, c = next_c;
    }
    if (!STATES_ONLY)
      *reinterpret_cast<float4*>(shared.partial[buffer][group][lane_group][row]) =
          make_float4(y[0], y[1], y[2], y[3]);
  }

  // NaN in place of a sum of steps says that nothing from before the span comes through.
  __device__ void empty() {
#pragma unroll
    for (int s = 0; s < 4; ++s) h[s] = 0.0f;
    if (STATES_ONLY) sum = NAN;
  }

  __device__ void store_all(float* to, const ScanArguments& p, const Place& at) const {
    store_states(to, at.channel + channel, lane_group * 4, p, h);
  }
};

}  // namespace longllava
