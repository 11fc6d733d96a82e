// Selective scan, backward, for one instruction set (isa.h). Forward: selective_scan_kernels.cpp.
//
// Reads the state saved before each chunk, walks the chunk forward once more, keeping decay and decayed state of one
// group of states (4 KiB with AVX2), and then back. dB and dC are sums over channels: lanes are added once per tile,
// tiles in fixed order within a slice, slices in fixed order at the end, so threads never change a bit.
// The gradients of A, D and bias are sums over tokens: of a chunk, of SUM_RUN chunks (vector.h), of all.
#include "selective_scan_tile.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int BLOCKS_MAX = SCAN_BACKWARD_TILE / WIDTH;
typedef Tile<BLOCKS_MAX, BLOCKS_MAX * SCAN_MAX_STATES> BackTile;
constexpr int GROUP = WIDTH == 16 ? 8 : 4;  // states walked together; of each, two vectors per token are kept

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

// Sums over all tokens: [block][state] and [block].
struct Totals {
  vec A[BLOCKS_MAX * SCAN_MAX_STATES], D[BLOCKS_MAX], bias[BLOCKS_MAX];
};

// Forward again over a chunk for G states, keeping decay and decayed state; then back. Adds to y, sum_gB, sum_step,
// grad_A, and to the sums of dB and dC (tokens, 2, G), which still hold one term per lane.
template <int G, bool CLAMP>
void walk_back(const vec* __restrict A, const float* __restrict saved, const float* __restrict B,
               const float* __restrict C, int n_states, const uint8_t* __restrict flags, int n_tokens,
               Chunk& __restrict chunk, int block, vec* __restrict grad_state, vec* __restrict grad_A,
               vec* __restrict sums, Ahead& ahead) {
  vec decay[SCAN_CHUNK * G], kept[SCAN_CHUNK * G];
  {
    vec h[G];
#pragma GCC unroll 16
    for (int i = 0; i < G; ++i) h[i] = load(saved + i * WIDTH);
    for (int t = 0; t < n_tokens; ++t) {
      ahead.fetch();
      if (flags[t] != TOKEN_PLAIN) {
        if (flags[t] == TOKEN_PADDING) continue;
#pragma GCC unroll 16
        for (int i = 0; i < G; ++i) h[i] = vec{};
      }
      vec y = chunk.y[block][t];
      constexpr int K = G < TOGETHER ? G : TOGETHER;
#pragma GCC unroll 16
      for (int i = 0; i < G; i += K) {
        vec a[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) a[k] = A[i + k];
        exp2_together<CLAMP>(a, chunk.d[block][t]);
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
#pragma GCC unroll 16
  for (int i = 0; i < G; ++i) gh[i] = grad_state[i], gA[i] = vec{};
  for (int t = n_tokens - 1; t >= 0; --t) {
    if (flags[t] == TOKEN_PADDING) continue;
    const vec d = chunk.d[block][t], du = chunk.du[block][t], g = chunk.g[block][t];
    vec gB = {}, step = {};
    vec *sum_B = sums + t * 2 * G, *sum_C = sum_B + G;
#pragma GCC unroll 16
    for (int i = 0; i < G; ++i) {
      const float b = B[t * n_states + i];
      const vec old = kept[t * G + i];
      sum_C[i] += g * (old + du * b);
      gh[i] += g * C[t * n_states + i];
      sum_B[i] += gh[i] * du;
      gB += gh[i] * b;
      const vec through = gh[i] * old;
      step += through * A[i];
      gA[i] += through * d;
      gh[i] *= decay[t * G + i];
    }
    chunk.sum_gB[block][t] += gB;
    chunk.sum_step[block][t] += step;
    if (flags[t] == TOKEN_RESET)
#pragma GCC unroll 16
      for (int i = 0; i < G; ++i) gh[i] = vec{};
  }
#pragma GCC unroll 16
  for (int i = 0; i < G; ++i) grad_state[i] = gh[i], grad_A[i] += gA[i];
}

// One group of states for all blocks of the tile, then the sums over its channels.
template <int G>
void group_back(const ScanArguments& a, const BackTile& tile, const Piece& piece, BackTile& grad, int i, const float* B,
                const float* C, Chunk& chunk, float* partial_B, float* partial_C) {
  const int n = tile.n_states, n_tokens = piece.n_tokens;
  const int64_t first = piece.token;
  constexpr int SUMS = SCAN_CHUNK * 2 * G;  // a multiple of WIDTH
  vec sums[SUMS];
  float totals[SUMS];
  const int n_sums = (n_tokens * 2 * G + WIDTH - 1) / WIDTH * WIDTH;
  for (int k = 0; k < n_sums; ++k) sums[k] = vec{};
  for (int block = 0; block < tile.n_blocks; ++block) {
    const int at = block * n + i;
    const float* saved = checkpoint(a, tile, first / SCAN_CHUNK, block) + i * WIDTH;
    const auto run = chunk.clamp[block] ? walk_back<G, true> : walk_back<G, false>;
    Ahead ahead(piece, block, a.u, a.delta, a.z, a.grad_y, a.grad_u, a.grad_delta, a.grad_z);
    if (i > 0) ahead.stop();
    run(tile.A + at, saved, B + i, C + i, n, piece.flags, n_tokens, chunk, block, grad.state + at, grad.A + at, sums,
        ahead);
  }
  for (int k = 0; k < n_sums; k += WIDTH) store(totals + k, sums_of_rows(sums + k));
  for (int t = 0; t < n_tokens; ++t)
    for (int k = 0; k < G; ++k) {
      partial_B[(first + t) * n + i + k] += totals[t * 2 * G + k];
      partial_C[(first + t) * n + i + k] += totals[t * 2 * G + G + k];
    }
}

template <int G>
void groups_back(const ScanArguments& a, const BackTile& tile, const Piece& piece, BackTile& grad, const float* B,
                 const float* C, Chunk& chunk, float* partial_B, float* partial_C, int i = 0) {
  for (; i + G <= tile.n_states; i += G)
    group_back<G>(a, tile, piece, grad, i, B, C, chunk, partial_B, partial_C);
  if constexpr (G > 1)
    if (i < tile.n_states) groups_back<G / 2>(a, tile, piece, grad, B, C, chunk, partial_B, partial_C, i);
}

void open_chunk(const ScanArguments& a, const BackTile& tile, const Piece& piece, Chunk& chunk) {
  const bool gated = a.z.data != nullptr;
  read_piece(a.u, piece, chunk.u[0]);
  read_piece(a.delta, piece, chunk.raw[0]);
  read_piece(a.grad_y, piece, chunk.grad[0]);
  if (gated) read_piece(a.z, piece, chunk.z[0]);
  for (int block = 0; block < tile.n_blocks; ++block) {
    vec* d = chunk.d[block];
    vec most = {};
    for (int t = 0; t < piece.n_tokens; ++t) d[t] = chunk.raw[block][t] + tile.bias[block];
    if (a.softplus) in_step(d, piece.n_tokens, [](auto& x) { softplus_together(x); });
    for (int t = 0; t < piece.n_tokens; ++t) most = maximum(absolute(d[t]), most);
    chunk.clamp[block] = needs_clamp(most, tile.most_A[block]);
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
void close_chunk(const ScanArguments& a, const BackTile& tile, const Piece& piece, BackTile& grad, Chunk& chunk) {
  const bool gated = a.z.data != nullptr;
  for (int block = 0; block < tile.n_blocks; ++block) {
    vec sum_D = {}, sum_bias = {};
    for (int t = 0; t < piece.n_tokens; ++t) {
      if (piece.flags[t] == TOKEN_PADDING) continue;
      vec &u = chunk.u[block][t], &d = chunk.d[block][t], &z = chunk.z[block][t];
      const vec g = chunk.g[block][t], sum_gB = chunk.sum_gB[block][t];
      sum_D += g * u;
      if (gated) z = chunk.grad[block][t] * chunk.y[block][t] * silu_slope(z);
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

void tile_back(const ScanPlan& plan, const BackTile& tile, float* partial_B, float* partial_C) {
  const ScanArguments& a = plan.args;
  const int n = tile.n_states;
  BackTile grad = tile;
  Totals totals;
  for (int i = 0; i < tile.n_blocks * n; ++i) totals.A[i] = grad.A[i] = grad.state[i] = vec{};
  for (int block = 0; block < tile.n_blocks; ++block)
    totals.D[block] = totals.bias[block] = grad.D[block] = grad.bias[block] = vec{};
  if (a.grad_state_out != nullptr) transpose_in(tile, a.grad_state_out + state_offset(a, tile), grad.state);

  float B[SCAN_CHUNK * SCAN_MAX_STATES], C[SCAN_CHUNK * SCAN_MAX_STATES];
  Chunk chunk;
  for (int64_t first = (a.length - 1) / SCAN_CHUNK * SCAN_CHUNK; first >= 0 && a.length > 0; first -= SCAN_CHUNK) {
    const Piece piece = chunk_piece(plan, tile, first, -SCAN_CHUNK);
    read_rows(a.B, piece, n, B);
    read_rows(a.C, piece, n, C);
    open_chunk(a, tile, piece, chunk);
    groups_back<GROUP>(a, tile, piece, grad, B, C, chunk, partial_B, partial_C);
    close_chunk(a, tile, piece, grad, chunk);
    if (first / SCAN_CHUNK % SUM_RUN == 0) {  // so the first chunk, walked last, ends the last run
      end_run(grad.A, totals.A, tile.n_blocks * n);
      end_run(grad.D, totals.D, tile.n_blocks);
      end_run(grad.bias, totals.bias, tile.n_blocks);
    }
  }
  const int64_t channels = tile.batch * a.channels + tile.first_channel;
  transpose_out(tile, totals.A, plan.partial_A + channels * n);
  if (a.grad_state != nullptr) transpose_out(tile, grad.state, a.grad_state + channels * n);
  for (int block = 0; block < tile.n_blocks; ++block) {
    store_some(plan.partial_D + channels + block * WIDTH, totals.D[block], lanes_of(tile, block));
    store_some(plan.partial_bias + channels + block * WIDTH, totals.bias[block], lanes_of(tile, block));
  }
}

}  // namespace

void scan_backward_task(void* context, int64_t task) {
  const WithoutDenormals guard;
  const ScanPlan& plan = *static_cast<const ScanPlan*>(context);
  const ScanArguments& a = plan.args;
  const int64_t batch = task / plan.n_slices, slice = task % plan.n_slices;
  const int64_t partial = (slice * a.batch + batch) * a.length * a.states;
  BackTile tile;
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
