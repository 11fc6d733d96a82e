// Selective scan, forward, for one instruction set (isa.h).
//
// WIDTH channels fill a vector, a group of states of these channels stays in registers, time is walked serially:
// no sums across lanes, one exponential per (token, channel, state), 11 vector operations with AVX-512 and 15 with
// AVX2. Tokens go in chunks of 32: B and C are widened to fp32 once per chunk and tile of channels, the
// step size and the gate (softplus, silu) are computed apart from the recurrence, where registers are free.
// Memory per token and channel: u, delta, z in, y out, each once; nothing else grows with length except the
// saved states (N / 32 floats per channel and token) when gradients are wanted.
#include "selective_scan_tile.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int GROUP = 16;  // states whose recurrences are walked together

// The recurrence of G states of one block over a chunk: y[t] += C . h, states updated.
template <int G, bool CLAMP>
void walk(const vec* __restrict A, vec* __restrict state, const vec* __restrict d, const vec* __restrict du,
          const float* __restrict B, const float* __restrict C, int n_states, const uint8_t* __restrict flags,
          int n_tokens, vec* __restrict y, Ahead& ahead) {
  vec h[G];
  for (int i = 0; i < G; ++i) h[i] = state[i];
  for (int t = 0; t < n_tokens; ++t, B += n_states, C += n_states) {
    ahead.fetch();
    if (flags[t] != TOKEN_PLAIN) {
      if (flags[t] == TOKEN_PADDING) continue;
      for (int i = 0; i < G; ++i) h[i] = vec{};
    }
    const vec step = d[t], input = du[t];
    vec even = y[t], odd = {};
    constexpr int K = G < TOGETHER ? G : TOGETHER;
#pragma GCC unroll 16
    for (int i = 0; i < G; i += K) {
      vec decay[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) decay[k] = step * A[i + k];
      exp2_together<CLAMP>(decay);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) h[i + k] = decay[k] * h[i + k] + input * B[i + k];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) (k % 2 == 0 ? even : odd) += h[i + k] * C[i + k];
    }
    y[t] = even + odd;
  }
  for (int i = 0; i < G; ++i) state[i] = h[i];
  ahead.stop();
}

// All states of one block: whole groups, then the largest groups that fit.
template <int G, bool CLAMP>
void walk_all(const vec* A, vec* state, const vec* d, const vec* du, const float* B, const float* C, int n_states,
              const uint8_t* flags, int n_tokens, vec* y, Ahead& ahead, int i = 0) {
  for (; i + G <= n_states; i += G)
    walk<G, CLAMP>(A + i, state + i, d, du, B + i, C + i, n_states, flags, n_tokens, y, ahead);
  if constexpr (G > 1)
    if (i < n_states) walk_all<G / 2, CLAMP>(A, state, d, du, B, C, n_states, flags, n_tokens, y, ahead, i);
}

}  // namespace

void scan_forward_task(void* context, int64_t task) {
  const ScanPlan& plan = *static_cast<const ScanPlan*>(context);
  const ScanArguments& a = plan.args;
  Tile tile;
  open_tile(a, task / plan.n_tiles, task % plan.n_tiles * plan.tile, int(plan.tile), tile);
  const int n = tile.n_states;
  if (a.state != nullptr)
    transpose_in(tile, a.state + state_offset(a, tile), tile.state);
  else
    for (int i = 0; i < tile.n_blocks * n; ++i) tile.state[i] = vec{};

  constexpr int TILE_VECTORS = SCAN_CHUNK * BLOCKS_MAX;
  float B[SCAN_CHUNK * SCAN_MAX_STATES], C[SCAN_CHUNK * SCAN_MAX_STATES];
  vec tile_u[TILE_VECTORS], tile_d[TILE_VECTORS], tile_y[TILE_VECTORS], tile_z[TILE_VECTORS];
  for (int64_t first = 0; first < a.length; first += SCAN_CHUNK) {
    const Piece piece = chunk_piece(plan, tile, first, SCAN_CHUNK);
    const int n_tokens = piece.n_tokens;
    read_rows(a.B, piece, n, B);
    read_rows(a.C, piece, n, C);
    read_piece(a.u, piece, tile_u);
    read_piece(a.delta, piece, tile_d);
    if (a.z.data != nullptr) read_piece(a.z, piece, tile_z);
    for (int block = 0; block < tile.n_blocks; ++block) {
      vec *u = tile_u + block * SCAN_CHUNK, *d = tile_d + block * SCAN_CHUNK;
      vec *y = tile_y + block * SCAN_CHUNK, *z = tile_z + block * SCAN_CHUNK;
      vec* state = tile.state + block * n;
      if (a.checkpoints != nullptr) {
        float* saved = checkpoint(a, tile, first / SCAN_CHUNK, block);
        for (int i = 0; i < n; ++i) store(saved + i * WIDTH, state[i]);
      }
      const bool clamp = step_sizes(a, tile, block, n_tokens, d);
      for (int t = 0; t < n_tokens; ++t) {
        y[t] = tile.D[block] * u[t];
        u[t] *= d[t];
      }
      const vec* A = tile.A + block * n;
      Ahead ahead(piece, block, a.u, a.delta, a.z, a.y);
      if (clamp) walk_all<GROUP, true>(A, state, d, u, B, C, n, piece.flags, n_tokens, y, ahead);
      else walk_all<GROUP, false>(A, state, d, u, B, C, n, piece.flags, n_tokens, y, ahead);
      if (a.z.data == nullptr) continue;
      in_fours(z, n_tokens, [](auto& x) { silu_together(x); });
      for (int t = 0; t < n_tokens; ++t) y[t] *= z[t];
    }
    write_piece(a.y, piece, tile_y);
  }
  transpose_out(tile, tile.state, a.state_out + state_offset(a, tile));
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
