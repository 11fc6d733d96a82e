// Selective scan, forward, for one instruction set (isa.h).
//
// WIDTH channels fill a vector, a group of states of these channels stays in registers, time is walked serially:
// no sums across lanes, one exponential per (token, channel, state), 11 vector operations with AVX-512 and 15 with
// AVX2. Tokens go in chunks of 8, in three steps: a row at a time the step sizes (softplus) and what they let in;
// block by block of WIDTH channels the walk; a row at a time the gate (silu). Rows are read and written where the
// arithmetic is, and what goes from step to step stays in the first cache.
// Memory per token and channel: u, delta, z in, y out, each once; nothing else grows with length except the
// saved states (N / 16 floats per channel and token) when gradients are wanted.
#include "selective_scan_tile.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int BLOCKS_MAX = SCAN_MAX_TILE / WIDTH;
constexpr int GROUP = WIDTH == 16 ? 8 : 16;  // states whose recurrences are walked together
constexpr int ROW_BLOCKS = 4;  // blocks of a row taken in step, by softplus and silu
static_assert(SCAN_CHUNK % SCAN_FORWARD_CHUNK == 0, "states are saved between two chunks");

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

// What the walk of a chunk reads and writes: [block][token].
struct Chunk {
  typedef vec Plane[BLOCKS_MAX][SCAN_FORWARD_CHUNK];
  Plane d, du, y;
  vec most_d[BLOCKS_MAX];  // of the chunk's |d|
};

// Calls f(block, lanes, K) for the blocks of a row, ROW_BLOCKS = K of them at a time, then one by one.
struct One { static constexpr int K = 1; };
struct Four { static constexpr int K = ROW_BLOCKS; };
template <class F>
LONGLLAVA_INLINE void blocks_of_row(int columns, F f) {
  const int whole = columns / WIDTH, rest = columns % WIDTH;
  int block = 0;
  for (; block + ROW_BLOCKS <= whole; block += ROW_BLOCKS) f(block, WIDTH, Four{});
  for (; block < whole; ++block) f(block, WIDTH, One{});
  if (rest != 0) f(block, rest, One{});
}

int64_t offset_of(const Rows& rows, const Piece& piece) {
  return piece.batch * rows.batch_stride + piece.token * rows.row_stride + piece.column;
}

// Step sizes, what they let in, and y = D u.
void open_chunk(const ScanArguments& a, const Tile<BLOCKS_MAX>& tile, const Piece& piece, Chunk& chunk) {
  int64_t at_u = offset_of(a.u, piece), at_delta = offset_of(a.delta, piece);
  for (int block = 0; block < tile.n_blocks; ++block) chunk.most_d[block] = vec{};
  for (int t = 0; t < piece.n_tokens; ++t, at_u += a.u.row_stride, at_delta += a.delta.row_stride) {
    if (piece.flags[t] == TOKEN_PADDING) continue;
    blocks_of_row(piece.columns, [&](int block, int lanes, auto count) {
      constexpr int K = decltype(count)::K;
      vec d[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        d[k] = read_lanes(a.delta, at_delta + (block + k) * WIDTH, lanes) + tile.bias[block + k];
      if (a.softplus) softplus_together(d);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const vec u = read_lanes(a.u, at_u + (block + k) * WIDTH, lanes);
        chunk.d[block + k][t] = d[k];
        chunk.du[block + k][t] = d[k] * u;
        chunk.y[block + k][t] = tile.D[block + k] * u;
        if (!EXP2_SATURATES) chunk.most_d[block + k] = maximum(absolute(d[k]), chunk.most_d[block + k]);
      }
    });
  }
}

// y silu(z), to where it belongs; 0 at padding.
void close_chunk(const ScanArguments& a, const Piece& piece, const Chunk& chunk) {
  int64_t at_z = offset_of(a.z, piece), at_y = offset_of(a.y, piece);
  for (int t = 0; t < piece.n_tokens; ++t, at_z += a.z.row_stride, at_y += a.y.row_stride) {
    const bool padding = piece.flags[t] == TOKEN_PADDING;
    blocks_of_row(piece.columns, [&](int block, int lanes, auto count) {
      constexpr int K = decltype(count)::K;
      vec y[K] = {};
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        if (!padding) y[k] = chunk.y[block + k][t];
      if (a.z.data != nullptr && !padding) {
        vec gate[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) gate[k] = read_lanes(a.z, at_z + (block + k) * WIDTH, lanes);
        silu_together(gate);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) y[k] *= gate[k];
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) write_lanes(a.y, at_y + (block + k) * WIDTH, y[k], lanes);
    });
  }
}

}  // namespace

void scan_forward_task(void* context, int64_t task) {
  const WithoutDenormals guard;
  const ScanPlan& plan = *static_cast<const ScanPlan*>(context);
  const ScanArguments& a = plan.args;
  Tile<BLOCKS_MAX> tile;
  open_tile(a, task / plan.n_tiles, task % plan.n_tiles * plan.tile, int(plan.tile), tile);
  const int n = tile.n_states;
  if (a.state != nullptr)
    transpose_in(tile, a.state + state_offset(a, tile), tile.state);
  else
    for (int i = 0; i < tile.n_blocks * n; ++i) tile.state[i] = vec{};

  float B[SCAN_FORWARD_CHUNK * SCAN_MAX_STATES], C[SCAN_FORWARD_CHUNK * SCAN_MAX_STATES];
  Chunk chunk;
  for (int64_t first = 0; first < a.length; first += SCAN_FORWARD_CHUNK) {
    const Piece piece = chunk_piece(plan, tile, first, SCAN_FORWARD_CHUNK);
    read_rows(a.B, piece, n, B);
    read_rows(a.C, piece, n, C);
    open_chunk(a, tile, piece, chunk);
    for (int block = 0; block < tile.n_blocks; ++block) {
      vec* state = tile.state + block * n;
      if (a.checkpoints != nullptr && first % SCAN_CHUNK == 0) {
        float* saved = checkpoint(a, tile, first / SCAN_CHUNK, block);
        for (int i = 0; i < n; ++i) store(saved + i * WIDTH, state[i]);
      }
      const bool clamp = needs_clamp(chunk.most_d[block], tile.most_A[block]);
      const auto run = clamp ? walk_all<GROUP, true> : walk_all<GROUP, false>;
      Ahead ahead(piece, block, a.u, a.delta, a.z, a.y);
      run(tile.A + block * n, state, chunk.d[block], chunk.du[block], B, C, n, piece.flags, piece.n_tokens,
          chunk.y[block], ahead, 0);
    }
    close_chunk(a, piece, chunk);
  }
  transpose_out(tile, tile.state, a.state_out + state_offset(a, tile));
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
