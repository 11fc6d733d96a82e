// The scan's forward kernel. A block holds 64 channels and walks one span of time in tiles of TOKENS tokens.
//
// Three kinds of warps work side by side, a tile or two apart, and meet at one barrier a tile. Main warps do nothing
// but the recurrence: four lanes hold a channel, each four states in registers, and take the tile's steps, B and C from
// shared memory. Others do what is done once a token and channel: preparing warps copy tiles from memory DEPTH tiles
// ahead and turn delta into steps for the tile after the next, finishing warps add up, gate and store the last tile's
// y. So the exponential unit, which limits the whole, is kept busy by one kind while another waits or multiplies. With
// one kind of helpers for both, 36,000 tokens of 8,192 channels took an H100 2.37 ms, with two 2.10
// (benchmarks/results/kernel-variants-h100.json).
//
// A call's fixed cost counts where a prompt is read in pieces. So the first tiles are asked for together, in the order
// in which they are needed, and the last state is stored while the last tile is finished. The kernel may also begin
// while the one ahead of it in the stream ends (`early`). A block takes 186 KB of an H100's shared memory and is alone
// on its processor: the next kernel's blocks come as this one's leave.
//
// nvcc lays main warps' loop out for as many registers as the helpers' code happens to need: 104 (13.0, bf16, sm_90).
// Where another form of it needed 84, 14 instructions lay between an exponential and its use, and not 25. So a change
// that moves the count (benchmarks/cuda_report.py) is to be timed.
//
// INT8: y leaves as int8 with a scale for each token, which all channels of the token share. Blocks that are on the
// device together add their part to a token's maximum, tell so a tile later, and write SCAN_LAG tiles later. A token
// and channel then moves 7 bytes here (u, delta, z in, one out) and 1 into the product that follows; with y in 16 bits
// and a pass of its own that quantises it, 8, 3 and 1. Yet the waiting costs more than the bytes (cuda_launch.py).
#pragma once

#include "selective_scan_main.cuh"

namespace longllava {

// One block alone on a processor, said to nvcc, or nothing said. Without a word it kept the kernels for states alone to 64
// registers on sm_80, for the sake of a second block that has no shared memory there, and spilled (13.0).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int LEAST_BLOCKS = 1;
#else
constexpr int LEAST_BLOCKS = 0;
#endif

template <class T, int TOKENS, int DEPTH, bool FAST, bool STATES_ONLY, bool INT8>
__global__ void __launch_bounds__(SCAN_THREADS, STATES_ONLY ? LEAST_BLOCKS : 0)
scan_forward(const __grid_constant__ ScanArguments p) {
  using Shared = ForwardShared<T, TOKENS, DEPTH>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  constexpr int RING = Shared::RING, LAG = INT8 ? SCAN_LAG : 0;
  static_assert(DEPTH <= 2, "z of the first tiles is there a tile after the first one that the loop asks for");
  const Place at(p, SCAN_CHANNELS);
  const int n_tiles = static_cast<int>((at.end - at.begin + TOKENS - 1) / TOKENS);
  if (threadIdx.x < 2 * SCAN_HELPERS) {
    const bool prepares = threadIdx.x < SCAN_HELPERS, finishes = !prepares;
    Helper<T, TOKENS, DEPTH, FAST, STATES_ONLY, INT8> helper(p, at, shared, threadIdx.x % SCAN_HELPERS);
    if (p.early == EARLY_WITH_PREFETCH) helper.prefetch_first(prepares);
    wait_for_kernel_ahead();
    helper.load_channels();
    helper.copy_first(prepares);
    // The first tile is prepared by those that will finish tiles, so that main warps begin a step earlier.
    if (prepares) helper.pass_rows();
    helper.load_rows(prepares ? TOKENS : 0);
    wait_copies<Shared::FIRST_TILES - 1>();
    meet<SCAN_THREADS>();
    int prepared = 1, buffer = 1, finished = 0;  // places in the rings
    for (int i = -1; i <= n_tiles + LAG; ++i) {
      if (i >= 0) {
        if (prepares && i + Shared::FIRST_TILES < n_tiles) helper.copy_next();
        commit_copies();
      }
      if (prepares && i + 2 < n_tiles) {
        helper.put_rows(buffer);
        helper.load_rows((i + 3) * TOKENS);
        helper.prepare((i + 2) * TOKENS, prepared, buffer);
        prepared = prepared + 1 == RING ? 0 : prepared + 1;
        buffer = buffer + 1 == SCAN_AHEAD ? 0 : buffer + 1;
      } else if (prepares) {
        let_next_kernel_begin();
      }
      if (finishes && i == -1) {
        helper.put_rows(0);
        helper.prepare(0, 0, 0);
      }
      if (finishes && !STATES_ONLY && i >= 1 && (!INT8 || i <= n_tiles)) {
        helper.finish((i - 1) * TOKENS, finished, (i - 1) & 1);
        finished = finished + 1 == RING ? 0 : finished + 1;
      }
      if constexpr (INT8) {
        if (finishes && i >= 2 && i <= n_tiles + 1) helper.tell((i - 2) * TOKENS);
        if (finishes && i >= 1 + LAG) helper.emit((i - 1 - LAG) * TOKENS);
      }
      if (i >= 0) wait_copies<DEPTH - 1>();
      else wait_copies<Shared::FIRST_TILES - 2>();
      meet<SCAN_THREADS>();
    }
    return;
  }
  wait_for_kernel_ahead();
  Main<T, TOKENS, DEPTH, FAST, STATES_ONLY> main(p, at, threadIdx.x - 2 * SCAN_HELPERS);
  const int64_t one_state = p.channels * p.states;
  const int lane = threadIdx.x % 32;
  float* saved = nullptr;
  if (!STATES_ONLY && p.saved != nullptr)
    saved = p.saved + (at.batch * ((p.length + SCAN_CHUNK - 1) / SCAN_CHUNK) + at.begin / SCAN_CHUNK) * one_state;
  int flag = FLAG_PLAIN;  // of this lane's token of the tile that comes next
  const auto load_flag = [&](int64_t tile) {
    const int64_t t = at.begin + tile * TOKENS + lane;
    flag = !FAST && p.flags != nullptr && lane < TOKENS && t < at.end ? p.flags[at.batch * p.length + t] : FLAG_PLAIN;
  };
  int place = 0;  // of the tile in the ring
  load_flag(0);
  meet<SCAN_THREADS>();
  for (int i = -1; i < n_tiles; ++i) {
    if (i == 0) main.begin(shared);
    if (i >= 0) {
      uint32_t resets = 0;
      if (!FAST) {
        resets = __ballot_sync(0xffffffffu, flag == FLAG_RESET);
        load_flag(i + 1);
      }
      if (saved != nullptr && i * TOKENS % SCAN_CHUNK == 0) {
        main.store_all(saved, p, at);
        saved += one_state;
      }
      main.advance(shared, place, i & 1, resets);
      place = place + 1 == SCAN_AHEAD ? 0 : place + 1;
    }
    meet<SCAN_THREADS>();
  }
  // Meanwhile the last tile is finished.
  if (STATES_ONLY) {
    main.store_all(p.pieces + (at.batch * p.n_spans + at.span) * one_state, p, at);
    if (main.lane_group == 0 && at.channel + main.channel < p.channels)
      p.sums[(at.batch * p.n_spans + at.span) * p.channels + at.channel + main.channel] = main.sum;
  } else if (at.span + 1 == p.n_spans) {
    main.store_all(p.end + at.batch * one_state, p, at);
  }
  for (int i = 0; i <= LAG; ++i) meet<SCAN_THREADS>();
}

}  // namespace longllava
