// Causal depthwise convolution with fused SiLU, forward and backward, for one instruction set (isa.h).
//
// WIDTH channels fill a vector, time is walked serially with the last K - 1 real inputs in registers: padding
// passes them by, a reset empties them, and what is left at the end is the state. A task takes a tile of channels,
// 32 tokens at a time. Backward needs the inputs before a chunk; it looks them up among the tokens (and the
// initial state) instead of saving them, lays the chunk's windows end to end, and walks back with the gradients of
// the K - 1 inputs in registers. Sums are over time and batch only, in fixed order: threads change no bit.
// Over time they are sums of a chunk, of SUM_RUN chunks (vector.h), of all.
// Bytes per token and channel: forward reads x and writes y; backward reads x and grad_y and writes grad_x.
#include "causal_conv1d.h"
#include "vector_math.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

constexpr int BLOCKS_MAX = CONV_MAX_TILE / WIDTH;
const uint8_t ALL_PLAIN[CONV_CHUNK] = {};

struct Tile {
  int64_t batch, first_channel;
  int channels, n_blocks;
  vec weight[BLOCKS_MAX][CONV_MAX_KERNEL], bias[BLOCKS_MAX];
  vec window[BLOCKS_MAX][CONV_MAX_KERNEL];  // the last K - 1 real inputs, oldest first; backward: their gradients
};

int lanes_of(const Tile& tile, int block) {
  const int left = tile.channels - block * WIDTH;
  return left < WIDTH ? left : WIDTH;
}

void open_tile(const ConvPlan& plan, int64_t task, Tile& tile) {
  const ConvArguments& a = plan.args;
  tile.batch = task / plan.n_tiles;
  tile.first_channel = task % plan.n_tiles * plan.tile;
  const int64_t left = a.channels - tile.first_channel;
  tile.channels = int(left < plan.tile ? left : plan.tile);
  tile.n_blocks = (tile.channels + WIDTH - 1) / WIDTH;
  for (int block = 0; block < tile.n_blocks; ++block) {
    const int64_t channel = tile.first_channel + block * WIDTH;
    const int lanes = lanes_of(tile, block);
    tile.bias[block] = a.bias == nullptr ? vec{} : load_some(a.bias + channel, lanes);
    for (int k = 0; k < a.kernel; ++k) {
      tile.weight[block][k] = vec{};
      for (int lane = 0; lane < lanes; ++lane) tile.weight[block][k][lane] = a.weight[(channel + lane) * a.kernel + k];
    }
  }
}

// The K - 1 rows of a state tensor, as a piece: [block][k]
Piece state_piece(const ConvArguments& a, const Tile& tile) {
  return Piece{tile.batch, 0, tile.first_channel, tile.channels, int(a.kernel) - 1, CONV_MAX_KERNEL, ALL_PLAIN, 0};
}

void read_window(const ConvArguments& a, Tile& tile, const Rows& rows) {
  if (rows.data != nullptr) {
    read_piece(rows, state_piece(a, tile), tile.window[0]);
    return;
  }
  for (int block = 0; block < tile.n_blocks; ++block)
    for (int k = 0; k < CONV_MAX_KERNEL; ++k) tile.window[block][k] = vec{};
}

Piece chunk_piece(const ConvPlan& plan, const Tile& tile, int64_t first, int step) {
  const int64_t length = plan.args.length, left = length - first, next = first + step;
  const uint8_t* flags = plan.flags == nullptr ? ALL_PLAIN : plan.flags + tile.batch * length + first;
  return Piece{tile.batch,  first,
               tile.first_channel, tile.channels,
               int(left < CONV_CHUNK ? left : CONV_CHUNK), CONV_CHUNK,
               flags, next >= 0 && next + CONV_CHUNK <= length ? step : 0};
}

bool only_padding(const Piece& piece) {
  int t = 0;
  while (t < piece.n_tokens && piece.flags[t] == TOKEN_PADDING) ++t;
  return t == piece.n_tokens;
}

template <int K>
void walk(const vec* weight, vec bias, vec* window, const uint8_t* flags, int n_tokens, const vec* x, vec* y,
          Ahead& ahead) {
  vec w[K], past[K];  // past[0 .. K-2]: the window
  for (int k = 0; k < K; ++k) w[k] = weight[k], past[k] = window[k];
  for (int t = 0; t < n_tokens; ++t) {
    ahead.fetch();
    if (flags[t] == TOKEN_PADDING) continue;
    if (flags[t] == TOKEN_RESET)
      for (int k = 0; k < K; ++k) past[k] = vec{};
    past[K - 1] = x[t];
    vec sum = bias;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sum += w[k] * past[k];
    y[t] = sum;
#pragma GCC unroll 8
    for (int k = 0; k + 1 < K; ++k) past[k] = past[k + 1];
  }
  for (int k = 0; k + 1 < K; ++k) window[k] = past[k];
}

// The inputs before a chunk, looked up: in the tokens before it, in the initial state, or 0 behind a reset.
template <int K>
void window_before(const ConvPlan& plan, const Tile& tile, int64_t first, vec (*window)[CONV_MAX_KERNEL]) {
  const ConvArguments& a = plan.args;
  const uint8_t* flags = plan.flags == nullptr ? nullptr : plan.flags + tile.batch * a.length;
  bool empty = false;
  int64_t t = first;
  int from_state = 0;
  for (int k = K - 2; k >= 0; --k) {
    Piece row{tile.batch, 0, tile.first_channel, tile.channels, 1, CONV_MAX_KERNEL, ALL_PLAIN, 0};
    if (!empty && t >= 0)
      do --t;
      while (t >= 0 && flags != nullptr && flags[t] == TOKEN_PADDING);
    if (!empty && t >= 0) {
      row.token = t;
      read_piece(a.x, row, window[0] + k);
      empty = flags != nullptr && flags[t] == TOKEN_RESET;
    } else if (!empty && a.state.data != nullptr) {
      row.token = K - 2 - from_state++;
      read_piece(a.state, row, window[0] + k);
    } else {
      for (int block = 0; block < tile.n_blocks; ++block) window[block][k] = vec{};
    }
  }
}

template <int K>
void forward(const ConvPlan& plan, Tile& tile) {
  const ConvArguments& a = plan.args;
  vec x[BLOCKS_MAX][CONV_CHUNK], y[BLOCKS_MAX][CONV_CHUNK];
  if (K > 1) read_window(a, tile, a.state);
  for (int64_t first = 0; first < a.length; first += CONV_CHUNK) {
    const Piece piece = chunk_piece(plan, tile, first, CONV_CHUNK);
    read_piece(a.x, piece, x[0]);
    for (int block = 0; block < tile.n_blocks; ++block) {
      Ahead ahead(piece, block, a.x, a.y);
      walk<K>(tile.weight[block], tile.bias[block], tile.window[block], piece.flags, piece.n_tokens, x[block], y[block],
              ahead);
      if (a.silu) in_step(y[block], piece.n_tokens, [](auto& x) { silu_together(x); });
    }
    write_piece(a.y, piece, y[0]);
  }
  if (K > 1) write_piece(a.state_out, state_piece(a, tile), tile.window[0]);
}

template <int K>
void backward(const ConvPlan& plan, Tile& tile) {
  const ConvArguments& a = plan.args;
  vec x[BLOCKS_MAX][CONV_CHUNK], grad[BLOCKS_MAX][CONV_CHUNK], before[BLOCKS_MAX][CONV_MAX_KERNEL];
  vec run[BLOCKS_MAX][K + 1] = {}, total[BLOCKS_MAX][K + 1] = {};  // gradients of the K weights and, last, of the bias
  if (K > 1) read_window(a, tile, a.grad_state_out);
  for (int64_t first = (a.length - 1) / CONV_CHUNK * CONV_CHUNK; first >= 0 && a.length > 0; first -= CONV_CHUNK) {
    const Piece piece = chunk_piece(plan, tile, first, -CONV_CHUNK);
    if (first / CONV_CHUNK % SUM_RUN == SUM_RUN - 1) end_run(run[0], total[0], tile.n_blocks * (K + 1));
    if (only_padding(piece)) {  // each would look for its window through all the padding before it
      write_piece(a.grad_x, piece, x[0]);
      continue;
    }
    read_piece(a.x, piece, x[0]);
    read_piece(a.grad_y, piece, grad[0]);
    window_before<K>(plan, tile, first, before);
    for (int block = 0; block < tile.n_blocks; ++block) {
      const vec* w = tile.weight[block];
      vec* g = grad[block];
      // windows end to end: the window of token t is line[at[t] .. at[t] + K - 1], its own input last
      vec line[(CONV_CHUNK + 1) * K], pre[CONV_CHUNK];
      int at[CONV_CHUNK], end = 0;
      for (int k = 0; k + 1 < K; ++k) line[end++] = before[block][k];
      Ahead ahead(piece, block, a.x, a.grad_y, a.grad_x);
      for (int t = 0; t < piece.n_tokens; ++t) {
        ahead.fetch();
        if (piece.flags[t] == TOKEN_PADDING) continue;
        if (piece.flags[t] == TOKEN_RESET)
          for (int k = 0; k + 1 < K; ++k) line[end++] = vec{};
        at[t] = end - (K - 1);
        line[end++] = x[block][t];
        vec sum = tile.bias[block];
        for (int k = 0; k < K; ++k) sum += w[k] * line[at[t] + k];
        pre[t] = sum;
      }
      if (a.silu) {
        for (int t = 0; t < piece.n_tokens; ++t)
          if (piece.flags[t] != TOKEN_PADDING) g[t] *= silu_slope(pre[t]);
      }
      vec flow[K], gw[K], gb = {};  // flow[k + 1]: gradient of window[k] after this token; flow[0] is empty
      flow[0] = vec{};
      for (int k = 0; k + 1 < K; ++k) flow[k + 1] = tile.window[block][k];
      for (int k = 0; k < K; ++k) gw[k] = vec{};
      for (int t = piece.n_tokens - 1; t >= 0; --t) {
        if (piece.flags[t] == TOKEN_PADDING) continue;
        gb += g[t];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          gw[k] += g[t] * line[at[t] + k];
          flow[k] += g[t] * w[k];
        }
        x[block][t] = flow[K - 1];
#pragma GCC unroll 8
        for (int k = K - 1; k > 0; --k) flow[k] = flow[k - 1];
        flow[0] = vec{};
        if (piece.flags[t] == TOKEN_RESET)
          for (int k = 0; k < K; ++k) flow[k] = vec{};
      }
      for (int k = 0; k + 1 < K; ++k) tile.window[block][k] = flow[k + 1];
      for (int k = 0; k < K; ++k) run[block][k] += gw[k];
      run[block][K] += gb;
    }
    write_piece(a.grad_x, piece, x[0]);
  }
  end_run(run[0], total[0], tile.n_blocks * (K + 1));
  if (K > 1 && a.grad_state.data != nullptr) write_piece(a.grad_state, state_piece(a, tile), tile.window[0]);
  for (int block = 0; block < tile.n_blocks; ++block) {
    const int64_t channel = tile.batch * a.channels + tile.first_channel + block * WIDTH;
    const int lanes = lanes_of(tile, block);
    store_some(plan.partial_bias + channel, total[block][K], lanes);
    for (int k = 0; k < K; ++k)
      for (int lane = 0; lane < lanes; ++lane) plan.partial_weight[(channel + lane) * K + k] = total[block][k][lane];
  }
}

template <int K>
void run(const ConvPlan& plan, int64_t task, bool is_backward) {
  if (plan.args.kernel != K) {
    if constexpr (K > 1) run<K - 1>(plan, task, is_backward);
    return;
  }
  Tile tile;
  open_tile(plan, task, tile);
  if (is_backward) backward<K>(plan, tile);
  else forward<K>(plan, tile);
}

}  // namespace

void conv_forward_task(void* plan, int64_t task) {
  run<CONV_MAX_KERNEL>(*static_cast<const ConvPlan*>(plan), task, false);
}

void conv_backward_task(void* plan, int64_t task) {
  run<CONV_MAX_KERNEL>(*static_cast<const ConvPlan*>(plan), task, true);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
