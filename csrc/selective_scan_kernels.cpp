// Selective scan, forward, for one instruction set (isa.h).
//
// WIDTH channels fill a vector, a group of states of these channels stays in registers, time is walked serially:
// no sums across lanes, one exponential per (token, channel, state), 11 vector operations with AVX-512 and 15 with
// AVX2. Tokens go in chunks, and in a chunk one block of WIDTH channels after another goes its whole way: step sizes
// (softplus) and what they let in, the walk, the gate (silu). What goes from step to step is at most 3 KB and stays in
// the first cache: all blocks step by step, in 24 KB, took 1.04 to 1.08 times as long in bf16 and 0.98 to 1.02 in fp32.
// Memory per token and channel: u, delta, z in, y out, each once; nothing else grows with length except the
// saved states (N / 16 floats per channel and token) when gradients are wanted.
#include "selective_scan_tile.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

typedef Tile<SCAN_MAX_TILE / WIDTH, SCAN_TILE_STATES / WIDTH> WideTile;
constexpr int GROUP = WIDTH == 16 ? 8 : 16;  // states whose recurrences are walked together

// The recurrence of G states of one block over a chunk: y[t] += C . h, states updated. Every loop over states is
// unrolled: an index that the compiler does not know would keep them in memory.
template <int G, bool CLAMP>
void walk(const vec* __restrict A, vec* __restrict state, const vec* __restrict d, const vec* __restrict du,
          const float* __restrict B, const float* __restrict C, int n_states, const uint8_t* __restrict flags,
          int n_tokens, vec* __restrict y, Ahead& ahead) {
  vec h[G];
#pragma GCC unroll 16
  for (int i = 0; i < G; ++i) h[i] = state[i];
  for (int t = 0; t < n_tokens; ++t, B += n_states, C += n_states) {
    ahead.fetch();
    if (flags[t] != TOKEN_PLAIN) {
      if (flags[t] == TOKEN_PADDING) continue;
#pragma GCC unroll 16
      for (int i = 0; i < G; ++i) h[i] = vec{};
    }
    const vec step = d[t], input = du[t];
    vec sum = y[t];
    constexpr int K = G < TOGETHER ? G : TOGETHER;
#pragma GCC unroll 16
    for (int i = 0; i < G; i += K) {
      vec decay[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) decay[k] = A[i + k];
      exp2_together<CLAMP>(decay, step);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) h[i + k] = decay[k] * h[i + k] + input * B[i + k];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum += h[i + k] * C[i + k];
    }
    y[t] = sum;
  }
#pragma GCC unroll 16
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

// What the walk of one block reads and writes: [token].
struct Chunk {
  vec d[SCAN_CHUNK], du[SCAN_CHUNK], y[SCAN_CHUNK];
};

// The rows of one block: token `t` of the chunk at offset at(t).
struct Column {
  const Rows& rows;
  int64_t first;
  Column(const Rows& rows, const Piece& piece, int block)
      : rows(rows),
        first(piece.batch * rows.batch_stride + piece.token * rows.row_stride + piece.column + block * WIDTH) {}
  int64_t at(int t) const { return first + t * rows.row_stride; }
};

// Step sizes, what they let in, and y = D u. Returns the largest |d|, where someone asks for it: not of padding, or what
// stands there would decide how the tokens beside it are rounded.
vec open_block(const ScanArguments& a, const Piece& piece, int block, int lanes, vec bias, vec D, Chunk& chunk) {
  const Column u_rows(a.u, piece, block), delta_rows(a.delta, piece, block);
  for (int t = 0; t < piece.n_tokens; ++t) chunk.d[t] = read_lanes(a.delta, delta_rows.at(t), lanes) + bias;
  if (a.softplus) in_step(chunk.d, piece.n_tokens, [](auto& x) { softplus_together(x); });
  vec most = {};
  for (int t = 0; t < piece.n_tokens; ++t) {
    const vec d = chunk.d[t], u = read_lanes(a.u, u_rows.at(t), lanes);
    chunk.du[t] = d * u;
    chunk.y[t] = D * u;
    if (!EXP2_SATURATES && piece.flags[t] != TOKEN_PADDING) most = maximum(absolute(d), most);
  }
  return most;
}

// y silu(z), to where it belongs; 0 at padding.
void close_block(const ScanArguments& a, const Piece& piece, int block, int lanes, vec* y) {
  if (a.z.data != nullptr) {
    const Column z_rows(a.z, piece, block);
    vec gate[SCAN_CHUNK];
    for (int t = 0; t < piece.n_tokens; ++t) gate[t] = read_lanes(a.z, z_rows.at(t), lanes);
    in_step(gate, piece.n_tokens, [](auto& x) { silu_together(x); });
    for (int t = 0; t < piece.n_tokens; ++t) y[t] *= gate[t];
  }
  const Column y_rows(a.y, piece, block);
  for (int t = 0; t < piece.n_tokens; ++t)
    write_lanes(a.y, y_rows.at(t), piece.flags[t] == TOKEN_PADDING ? vec{} : y[t], lanes);
}

}  // namespace

void scan_forward_task(void* context, int64_t task) {
  const WithoutDenormals guard;
  const ScanPlan& plan = *static_cast<const ScanPlan*>(context);
  const ScanArguments& a = plan.args;
  WideTile tile;
  open_tile(a, task / plan.n_tiles, task % plan.n_tiles * plan.tile, int(plan.tile), tile);
  const int n = tile.n_states;
  if (a.state != nullptr)
    transpose_in(tile, a.state + state_offset(a, tile), tile.state);
  else
    for (int i = 0; i < tile.n_blocks * n; ++i) tile.state[i] = vec{};

  float B[SCAN_CHUNK * SCAN_MAX_STATES], C[SCAN_CHUNK * SCAN_MAX_STATES];
  Chunk chunk;
  // fp32 rows of as many channels lie on twice the pages: 16 tokens take 1.00 to 1.07 times as long as 8, and in bf16
  // 0.95 to 0.98 of it.
  const int chunk_tokens = a.u.dtype == DTYPE_FLOAT32 ? SCAN_CHUNK / 2 : SCAN_CHUNK;
  for (int64_t first = 0; first < a.length; first += chunk_tokens) {
    const Piece piece = chunk_piece(plan, tile, first, chunk_tokens);
    read_rows(a.B, piece, n, B);
    read_rows(a.C, piece, n, C);
    for (int block = 0; block < tile.n_blocks; ++block) {
      const int lanes = lanes_of(tile, block);
      vec* state = tile.state + block * n;
      if (a.checkpoints != nullptr && first % SCAN_CHUNK == 0) {
        float* saved = checkpoint(a, tile, first / SCAN_CHUNK, block);
        for (int i = 0; i < n; ++i) store(saved + i * WIDTH, state[i]);
      }
      const vec most_d = open_block(a, piece, block, lanes, tile.bias[block], tile.D[block], chunk);
      const auto run = needs_clamp(most_d, tile.most_A[block]) ? walk_all<GROUP, true> : walk_all<GROUP, false>;
      Ahead ahead(piece, block, a.u, a.delta, a.z, a.y);
      run(tile.A + block * n, state, chunk.d, chunk.du, B, C, n, piece.flags, piece.n_tokens, chunk.y, ahead, 0);
      close_block(a, piece, block, lanes, chunk.y);
    }
  }
  transpose_out(tile, tile.state, a.state_out + state_offset(a, tile));
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
