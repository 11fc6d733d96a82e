// Selective scan, forward and backward, for one instruction set (isa.h).
//
// WIDTH channels fill a vector, a group of states of these channels stays in registers, time is walked serially:
// no sums across lanes, one exponential per (token, channel, state), about 12 vector operations with AVX-512 and
// 15 with AVX2. Tokens go in chunks of 32: B and C are widened to fp32 once per chunk and tile of channels, the
// step size and the gate (softplus, silu) are computed apart from the recurrence, where registers are free.
// Backward reads the state saved before each chunk, walks the chunk forward once more, keeping decay and decayed
// state of one group (16 KiB with AVX2), and then back. dB and dC are sums over channels: lanes are added once per
// tile, tiles in fixed order within a slice, slices in fixed order at the end, so threads never change a bit.
// Memory per token and channel: u, delta, z in, y out, each once; nothing else grows with length except the
// saved states (N / 32 floats per channel and token) when gradients are wanted.
#include "selective_scan.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int BLOCKS_MAX = SCAN_MAX_TILE / WIDTH;
constexpr int FORWARD_GROUP = 16;                       // states whose recurrences are walked together
constexpr int BACKWARD_GROUP = WIDTH == 16 ? 8 : 4;     // fewer: two values per state and token are kept
constexpr int TOGETHER = 2;                             // exponentials computed in step (vector.h)


const uint8_t ALL_PLAIN[SCAN_CHUNK] = {};

// Where one tile of channels lies, and its parameters as vectors: [block][state].
struct Tile {
  int64_t batch, first_channel;
  int channels, n_blocks, n_states;
  vec D[BLOCKS_MAX], bias[BLOCKS_MAX], most_A[BLOCKS_MAX];
  vec A[BLOCKS_MAX * SCAN_MAX_STATES];      // times log2(e)
  vec state[BLOCKS_MAX * SCAN_MAX_STATES];  // backward: the gradient of the state
};

int lanes_of(const Tile& tile, int block) {
  const int left = tile.channels - block * WIDTH;
  return left < WIDTH ? left : WIDTH;
}

// from: (E, N) rows of the tile's channels -> to[block][state], lanes of missing channels 0
void transpose_in(const Tile& tile, const float* from, vec* to) {
  const int n = tile.n_states;
  for (int block = 0; block < tile.n_blocks; ++block, from += n * WIDTH, to += n) {
    const int lanes = lanes_of(tile, block);
    for (int i = 0; i < n; i += WIDTH) {
      const int columns = n - i < WIDTH ? n - i : WIDTH;
      vec square[WIDTH] = {};
      for (int lane = 0; lane < lanes; ++lane)
        square[lane] = columns == WIDTH ? load(from + lane * n + i) : load_some(from + lane * n + i, columns);
      transpose(square);
      for (int k = 0; k < columns; ++k) to[i + k] = square[k];
    }
  }
}

void transpose_out(const Tile& tile, const vec* from, float* to) {
  const int n = tile.n_states;
  for (int block = 0; block < tile.n_blocks; ++block, from += n, to += n * WIDTH) {
    const int lanes = lanes_of(tile, block);
    for (int i = 0; i < n; i += WIDTH) {
      const int columns = n - i < WIDTH ? n - i : WIDTH;
      vec square[WIDTH] = {};
      for (int k = 0; k < columns; ++k) square[k] = from[i + k];
      transpose(square);
      for (int lane = 0; lane < lanes; ++lane) {
        if (columns == WIDTH) store(to + lane * n + i, square[lane]);
        else store_some(to + lane * n + i, square[lane], columns);
      }
    }
  }
}

void open_tile(const ScanArguments& a, int64_t batch, int64_t first_channel, int tile_channels, Tile& tile) {
  const int64_t left = a.channels - first_channel;
  tile.channels = left < tile_channels ? int(left) : tile_channels;
  tile.batch = batch;
  tile.first_channel = first_channel;
  tile.n_states = int(a.states);
  tile.n_blocks = (tile.channels + WIDTH - 1) / WIDTH;
  for (int block = 0; block < tile.n_blocks; ++block) {
    const int lanes = lanes_of(tile, block);
    const int64_t channel = first_channel + block * WIDTH;
    tile.D[block] = a.D == nullptr ? vec{} : load_some(a.D + channel, lanes);
    tile.bias[block] = a.bias == nullptr ? vec{} : load_some(a.bias + channel, lanes);
  }
  transpose_in(tile, a.A + first_channel * a.states, tile.A);
  for (int block = 0; block < tile.n_blocks; ++block) {
    vec most = {};
    for (int i = 0; i < tile.n_states; ++i) {
      vec& A = tile.A[block * tile.n_states + i];
      A *= LOG2_E;
      most = maximum(absolute(A), most);
    }
    tile.most_A[block] = most;
  }
}

int64_t state_offset(const ScanArguments& a, const Tile& tile) {
  return (tile.batch * a.channels + tile.first_channel) * a.states;
}

// The states saved before chunk `chunk`, for one block: [state] vectors, one after another.
float* checkpoint(const ScanArguments& a, const Tile& tile, int64_t chunk, int block) {
  const int64_t n_chunks = (a.length + SCAN_CHUNK - 1) / SCAN_CHUNK, n_blocks = (a.channels + 15) / 16 * 16 / WIDTH;
  const int64_t index = (tile.batch * n_chunks + chunk) * n_blocks + tile.first_channel / WIDTH + block;
  return a.checkpoints + index * a.states * WIDTH;
}

// Step sizes d of one block from delta in place; true when d A may leave the range that needs no clamp.
bool step_sizes(const ScanArguments& a, const Tile& tile, int block, int n_tokens, vec* d) {
  vec most = {}, e[SCAN_CHUNK];
  for (int t = 0; t < n_tokens; ++t) d[t] += tile.bias[block];
  if (a.softplus) {
    for (int t = 0; t < n_tokens; ++t) e[t] = softplus_exp(d[t]);
    for (int t = 0; t < n_tokens; ++t) d[t] = softplus(d[t], e[t]);
  }
  for (int t = 0; t < n_tokens; ++t) most = maximum(absolute(d[t]), most);
  return !(max_lanes(most * tile.most_A[block]) < 126.0f);
}

// The recurrence of G states of one block over a chunk: y[t] += C . h, states updated.
template <int G, bool CLAMP>
void walk(const vec* __restrict A, vec* __restrict state, const vec* __restrict d, const vec* __restrict du,
          const float* __restrict B, const float* __restrict C, int n_states, const uint8_t* __restrict flags,
          int n_tokens, vec* __restrict y) {
  vec h[G];
  for (int i = 0; i < G; ++i) h[i] = state[i];
  for (int t = 0; t < n_tokens; ++t, B += n_states, C += n_states) {
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
}

// All states of one block: whole groups, then the largest groups that fit.
template <int G, bool CLAMP>
void walk_all(const vec* A, vec* state, const vec* d, const vec* du, const float* B, const float* C, int n_states,
              const uint8_t* flags, int n_tokens, vec* y, int i = 0) {
  for (; i + G <= n_states; i += G)
    walk<G, CLAMP>(A + i, state + i, d, du, B + i, C + i, n_states, flags, n_tokens, y);
  if constexpr (G > 1)
    if (i < n_states) walk_all<G / 2, CLAMP>(A, state, d, du, B, C, n_states, flags, n_tokens, y, i);
}

// The tokens of one chunk and the channels of a tile. step: SCAN_CHUNK forward, -SCAN_CHUNK backward.
Piece chunk_piece(const ScanPlan& plan, const Tile& tile, int64_t first, int step) {
  const int64_t length = plan.args.length, left = length - first, next = first + step;
  Piece piece;
  piece.batch = tile.batch;
  piece.token = first;
  piece.column = tile.first_channel;
  piece.columns = tile.channels;
  piece.n_tokens = left < SCAN_CHUNK ? int(left) : SCAN_CHUNK;
  piece.pitch = SCAN_CHUNK;
  piece.flags = plan.flags == nullptr ? ALL_PLAIN : plan.flags + tile.batch * length + first;
  piece.next = next >= 0 && next + SCAN_CHUNK <= length ? step : 0;
  return piece;
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
      if (clamp) walk_all<FORWARD_GROUP, true>(A, state, d, u, B, C, n, piece.flags, n_tokens, y);
      else walk_all<FORWARD_GROUP, false>(A, state, d, u, B, C, n, piece.flags, n_tokens, y);
      if (a.z.data != nullptr)
        for (int t = 0; t < n_tokens; ++t) y[t] *= z[t] * sigmoid(z[t]);
    }
    write_piece(a.y, piece, tile_y);
  }
  transpose_out(tile, tile.state, a.state_out + state_offset(a, tile));
}

namespace {

// What backward keeps of one tile over a chunk: [block][token].
struct Chunk {
  typedef vec Plane[BLOCKS_MAX][SCAN_CHUNK];
  Plane u, raw, d, du, z, grad;
  Plane g;         // gradient of the ungated y
  Plane y;         // the ungated y
  Plane sum_gB;    // sum over states of (gradient of h) B
  Plane sum_step;  // sum over states of the gradient of (d A) times A
  bool clamp[BLOCKS_MAX];
};

// Forward again over a chunk for G states, keeping decay and decayed state; then back. Adds to y, sum_gB, sum_step,
// grad_A, and to sum_B and sum_C (tokens, G), which still hold one term per lane.
template <int G, bool CLAMP>
void walk_back(const vec* __restrict A, const float* __restrict saved, const float* __restrict B,
               const float* __restrict C, int n_states, const uint8_t* __restrict flags, int n_tokens,
               Chunk& __restrict chunk, int block, vec* __restrict grad_state, vec* __restrict grad_A,
               vec* __restrict sum_B, vec* __restrict sum_C) {
  vec decay[SCAN_CHUNK * G], kept[SCAN_CHUNK * G];
  {
    vec h[G];
    for (int i = 0; i < G; ++i) h[i] = load(saved + i * WIDTH);
    for (int t = 0; t < n_tokens; ++t) {
      if (flags[t] != TOKEN_PLAIN) {
        if (flags[t] == TOKEN_PADDING) continue;
        for (int i = 0; i < G; ++i) h[i] = vec{};
      }
      vec y = chunk.y[block][t];
      constexpr int K = G < TOGETHER ? G : TOGETHER;
#pragma GCC unroll 16
      for (int i = 0; i < G; i += K) {
        vec a[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) a[k] = chunk.d[block][t] * A[i + k];
        exp2_together<CLAMP>(a);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          const vec old = a[k] * h[i + k];
          decay[t * G + i + k] = a[k];
          kept[t * G + i + k] = old;
          h[i + k] = old + chunk.du[block][t] * B[t * n_states + i + k];
          y += h[i + k] * C[t * n_states + i + k];
        }
      }
      chunk.y[block][t] = y;
    }
  }
  vec gh[G], gA[G];
  for (int i = 0; i < G; ++i) gh[i] = grad_state[i], gA[i] = vec{};
  for (int t = n_tokens - 1; t >= 0; --t) {
    if (flags[t] == TOKEN_PADDING) continue;
    const vec d = chunk.d[block][t], du = chunk.du[block][t], g = chunk.g[block][t];
    vec gB = {}, step = {};
#pragma GCC unroll 16
    for (int i = 0; i < G; ++i) {
      const float b = B[t * n_states + i];
      const vec old = kept[t * G + i];
      sum_C[t * G + i] += g * (old + du * b);
      gh[i] += g * C[t * n_states + i];
      sum_B[t * G + i] += gh[i] * du;
      gB += gh[i] * b;
      const vec through = gh[i] * old;
      step += through * A[i];
      gA[i] += through * d;
      gh[i] *= decay[t * G + i];
    }
    chunk.sum_gB[block][t] += gB;
    chunk.sum_step[block][t] += step;
    if (flags[t] == TOKEN_RESET)
      for (int i = 0; i < G; ++i) gh[i] = vec{};
  }
  for (int i = 0; i < G; ++i) grad_state[i] = gh[i], grad_A[i] += gA[i];
}

// One group of states for all blocks of the tile, then the sums over its channels.
template <int G>
void group_back(const ScanArguments& a, const Tile& tile, Tile& grad, int64_t first, int i, const float* B,
                const float* C, const uint8_t* flags, int n_tokens, Chunk& chunk, float* partial_B, float* partial_C) {
  const int n = tile.n_states;
  vec sum_B[SCAN_CHUNK * G], sum_C[SCAN_CHUNK * G];
  for (int k = 0; k < n_tokens * G; ++k) sum_B[k] = sum_C[k] = vec{};
  for (int block = 0; block < tile.n_blocks; ++block) {
    const int at = block * n + i;
    const float* saved = checkpoint(a, tile, first / SCAN_CHUNK, block) + i * WIDTH;
    const auto run = chunk.clamp[block] ? walk_back<G, true> : walk_back<G, false>;
    run(tile.A + at, saved, B + i, C + i, n, flags, n_tokens, chunk, block, grad.state + at, grad.A + at, sum_B,
        sum_C);
  }
  for (int t = 0; t < n_tokens; ++t)
    for (int k = 0; k < G; ++k) {
      partial_B[(first + t) * n + i + k] += sum_lanes(sum_B[t * G + k]);
      partial_C[(first + t) * n + i + k] += sum_lanes(sum_C[t * G + k]);
    }
}

template <int G>
void groups_back(const ScanArguments& a, const Tile& tile, Tile& grad, int64_t first, const float* B, const float* C,
                 const uint8_t* flags, int n_tokens, Chunk& chunk, float* partial_B, float* partial_C, int i = 0) {
  for (; i + G <= tile.n_states; i += G)
    group_back<G>(a, tile, grad, first, i, B, C, flags, n_tokens, chunk, partial_B, partial_C);
  if constexpr (G > 1)
    if (i < tile.n_states)
      groups_back<G / 2>(a, tile, grad, first, B, C, flags, n_tokens, chunk, partial_B, partial_C, i);
}

void open_chunk(const ScanArguments& a, const Tile& tile, const Piece& piece, Chunk& chunk) {
  const bool gated = a.z.data != nullptr;
  read_piece(a.u, piece, chunk.u[0]);
  read_piece(a.delta, piece, chunk.raw[0]);
  read_piece(a.grad_y, piece, chunk.grad[0]);
  if (gated) read_piece(a.z, piece, chunk.z[0]);
  for (int block = 0; block < tile.n_blocks; ++block) {
    for (int t = 0; t < piece.n_tokens; ++t) chunk.d[block][t] = chunk.raw[block][t];
    chunk.clamp[block] = step_sizes(a, tile, block, piece.n_tokens, chunk.d[block]);
    for (int t = 0; t < piece.n_tokens; ++t) {
      const vec u = chunk.u[block][t], grad = chunk.grad[block][t], z = chunk.z[block][t];
      chunk.du[block][t] = chunk.d[block][t] * u;
      chunk.y[block][t] = tile.D[block] * u;
      chunk.g[block][t] = gated ? grad * z * sigmoid(z) : grad;
      chunk.sum_gB[block][t] = chunk.sum_step[block][t] = vec{};
    }
  }
}

// Turns what the walks left in the chunk into gradients and writes them; grad.D and grad.bias collect sums.
void close_chunk(const ScanArguments& a, const Tile& tile, const Piece& piece, Tile& grad, Chunk& chunk) {
  const bool gated = a.z.data != nullptr;
  for (int block = 0; block < tile.n_blocks; ++block) {
    vec sum_D = {}, sum_bias = {};
    for (int t = 0; t < piece.n_tokens; ++t) {
      if (piece.flags[t] == TOKEN_PADDING) continue;
      vec &u = chunk.u[block][t], &d = chunk.d[block][t], &z = chunk.z[block][t];
      const vec g = chunk.g[block][t], sum_gB = chunk.sum_gB[block][t];
      sum_D += g * u;
      if (gated) {
        const vec gate = sigmoid(z);
        z = chunk.grad[block][t] * chunk.y[block][t] * gate * (1.0f + z * (1.0f - gate));
      }
      // A was scaled by log2(e) for exp2; the gradient wants it back
      vec grad_d = chunk.sum_step[block][t] * (1.0f / LOG2_E) + u * sum_gB;
      if (a.softplus) {
        const vec raw = chunk.raw[block][t] + tile.bias[block];
        grad_d *= raw > 20.0f ? splat(1.0f) : sigmoid(raw);
      }
      sum_bias += grad_d;
      u = g * tile.D[block] + d * sum_gB;
      d = grad_d;
    }
    grad.D[block] += sum_D;
    grad.bias[block] += sum_bias;
  }
  write_piece(a.grad_u, piece, chunk.u[0]);
  write_piece(a.grad_delta, piece, chunk.d[0]);
  if (gated) write_piece(a.grad_z, piece, chunk.z[0]);
}

void tile_back(const ScanPlan& plan, const Tile& tile, float* partial_B, float* partial_C) {
  const ScanArguments& a = plan.args;
  const int n = tile.n_states;
  Tile grad = tile;
  for (int i = 0; i < tile.n_blocks * n; ++i) grad.A[i] = grad.state[i] = vec{};
  for (int block = 0; block < tile.n_blocks; ++block) grad.D[block] = grad.bias[block] = vec{};
  if (a.grad_state_out != nullptr) transpose_in(tile, a.grad_state_out + state_offset(a, tile), grad.state);

  float B[SCAN_CHUNK * SCAN_MAX_STATES], C[SCAN_CHUNK * SCAN_MAX_STATES];
  Chunk chunk;
  for (int64_t first = (a.length - 1) / SCAN_CHUNK * SCAN_CHUNK; first >= 0 && a.length > 0; first -= SCAN_CHUNK) {
    const Piece piece = chunk_piece(plan, tile, first, -SCAN_CHUNK);
    read_rows(a.B, piece, n, B);
    read_rows(a.C, piece, n, C);
    open_chunk(a, tile, piece, chunk);
    groups_back<BACKWARD_GROUP>(a, tile, grad, first, B, C, piece.flags, piece.n_tokens, chunk, partial_B, partial_C);
    close_chunk(a, tile, piece, grad, chunk);
  }
  const int64_t channels = tile.batch * a.channels + tile.first_channel;
  transpose_out(tile, grad.A, plan.partial_A + channels * n);
  if (a.grad_state != nullptr) transpose_out(tile, grad.state, a.grad_state + channels * n);
  for (int block = 0; block < tile.n_blocks; ++block) {
    store_some(plan.partial_D + channels + block * WIDTH, grad.D[block], lanes_of(tile, block));
    store_some(plan.partial_bias + channels + block * WIDTH, grad.bias[block], lanes_of(tile, block));
  }
}

}  // namespace

void scan_backward_task(void* context, int64_t task) {
  const ScanPlan& plan = *static_cast<const ScanPlan*>(context);
  const ScanArguments& a = plan.args;
  const int64_t batch = task / plan.n_slices, slice = task % plan.n_slices;
  const int64_t partial = (slice * a.batch + batch) * a.length * a.states;
  Tile tile;
  for (int64_t i = slice * plan.n_tiles / plan.n_slices; i < (slice + 1) * plan.n_tiles / plan.n_slices; ++i) {
    open_tile(a, batch, i * plan.tile, int(plan.tile), tile);
    tile_back(plan, tile, plan.partial_B + partial, plan.partial_C + partial);
  }
}

// Sums partial dB and dC of SCAN_REDUCE_ROWS tokens over the slices.
void scan_reduce_task(void* context, int64_t task) {
  const ScanPlan& plan = *static_cast<const ScanPlan*>(context);
  const ScanArguments& a = plan.args;
  const int64_t per_row = (a.length + SCAN_REDUCE_ROWS - 1) / SCAN_REDUCE_ROWS;
  const int64_t batch = task / per_row, first = task % per_row * SCAN_REDUCE_ROWS;
  const int64_t last = first + SCAN_REDUCE_ROWS < a.length ? first + SCAN_REDUCE_ROWS : a.length;
  const int64_t slice_stride = a.batch * a.length * a.states;
  for (int side = 0; side < 2; ++side) {
    for (int64_t t = first; t < last; ++t) {
      const float* from = (side == 0 ? plan.partial_B : plan.partial_C) + (batch * a.length + t) * a.states;
      for (int64_t i = 0; i < a.states; i += WIDTH) {
        const int lanes = a.states - i < WIDTH ? int(a.states - i) : WIDTH;
        vec sum = {};
        for (int64_t slice = 0; slice < plan.n_slices; ++slice)
          sum += load_some(from + slice * slice_stride + i, lanes);
        write_piece(side == 0 ? a.grad_B : a.grad_C, Piece{batch, t, i, lanes, 1, 1, ALL_PLAIN, 0}, &sum);
      }
    }
  }
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
