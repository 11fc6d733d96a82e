// A tile of channels of the selective scan: its parameters and states as vectors, its chunks of tokens, its step sizes.
// Include from selective_scan*_kernels.cpp only.
#pragma once

#include "denormals.h"
#include "selective_scan.h"
#include "vector_math.h"

namespace longllava {
namespace LONGLLAVA_FORM {
namespace {

// Exponentials computed in step (vector_math.h): more would not leave registers for the rest.
constexpr int TOGETHER = WIDTH == 16 ? 4 : 2;

const uint8_t ALL_PLAIN[SCAN_CHUNK] = {};

// Where one tile of channels lies, and its parameters as vectors: [block][state].
template <int BLOCKS, int VECTORS>
struct Tile {
  int64_t batch, first_channel;
  int channels, n_blocks, n_states;
  vec D[BLOCKS], bias[BLOCKS], most_A[BLOCKS];
  vec A[VECTORS];      // times log2(e)
  vec state[VECTORS];  // backward: the gradient of the state
};

template <class AnyTile>
int lanes_of(const AnyTile& tile, int block) {
  const int left = tile.channels - block * WIDTH;
  return left < WIDTH ? left : WIDTH;
}

// A square of states: lane `l` of square[i] is from[l * pitch + i]; missing rows and columns are 0.
LONGLLAVA_INLINE void load_square(const float* from, int pitch, int rows, int columns, vec (&square)[WIDTH]) {
  if (rows == WIDTH && columns == WIDTH)
    for (int i = 0; i < WIDTH; ++i) square[i] = load(from + i * pitch);
  else
    for (int i = 0; i < WIDTH; ++i) square[i] = i < rows ? load_some(from + i * pitch, columns) : vec{};
  transpose(square);
}

// from: (E, N) rows of the tile's channels -> to[block][state], lanes of missing channels 0
template <class AnyTile>
void transpose_in(const AnyTile& tile, const float* from, vec* to) {
  const int n = tile.n_states;
  for (int block = 0; block < tile.n_blocks; ++block, from += n * WIDTH, to += n) {
    for (int i = 0; i < n; i += WIDTH) {
      const int columns = n - i < WIDTH ? n - i : WIDTH;
      vec square[WIDTH];
      load_square(from + i, n, lanes_of(tile, block), columns, square);
      if (columns == WIDTH)
        for (int k = 0; k < WIDTH; ++k) to[i + k] = square[k];
      else
        for (int k = 0; k < columns; ++k) to[i + k] = square[k];
    }
  }
}

template <class AnyTile>
void transpose_out(const AnyTile& tile, const vec* from, float* to) {
  const int n = tile.n_states;
  for (int block = 0; block < tile.n_blocks; ++block, from += n, to += n * WIDTH) {
    const int lanes = lanes_of(tile, block);
    for (int i = 0; i < n; i += WIDTH) {
      const int columns = n - i < WIDTH ? n - i : WIDTH;
      const float* lane = reinterpret_cast<const float*>(from + i);
      vec square[WIDTH];
      load_square(lane, WIDTH, columns, WIDTH, square);
      if (lanes == WIDTH && columns == WIDTH)
        for (int k = 0; k < WIDTH; ++k) store(to + k * n + i, square[k]);
      else
        for (int k = 0; k < lanes; ++k) store_some(to + k * n + i, square[k], columns);
    }
  }
}

template <class AnyTile>
void open_tile(const ScanArguments& a, int64_t batch, int64_t first_channel, int tile_channels, AnyTile& tile) {
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

template <class AnyTile>
int64_t state_offset(const ScanArguments& a, const AnyTile& tile) {
  return (tile.batch * a.channels + tile.first_channel) * a.states;
}

// The states saved before chunk `chunk`, for one block: [state] vectors, one after another.
template <class AnyTile>
float* checkpoint(const ScanArguments& a, const AnyTile& tile, int64_t chunk, int block) {
  const int64_t n_chunks = (a.length + SCAN_CHUNK - 1) / SCAN_CHUNK, n_blocks = (a.channels + 15) / 16 * 16 / WIDTH;
  const int64_t index = (tile.batch * n_chunks + chunk) * n_blocks + tile.first_channel / WIDTH + block;
  return a.checkpoints + index * a.states * WIDTH;
}

// True when |d A| may leave the range that needs no clamp (vector_math.h); where exp2 saturates, nothing needs one.
LONGLLAVA_INLINE bool needs_clamp(vec most_d, vec most_A) {
  return !EXP2_SATURATES && !all_below(most_d * most_A, 126.0f);
}

// The tokens of one chunk and the channels of a tile. step: its tokens, negative backward.
template <class AnyTile>
Piece chunk_piece(const ScanPlan& plan, const AnyTile& tile, int64_t first, int step) {
  const int64_t length = plan.args.length, left = length - first, next = first + step;
  const int chunk = step < 0 ? -step : step;
  Piece piece;
  piece.batch = tile.batch;
  piece.token = first;
  piece.column = tile.first_channel;
  piece.columns = tile.channels;
  piece.n_tokens = left < chunk ? int(left) : chunk;
  piece.pitch = chunk;
  piece.flags = plan.flags == nullptr ? ALL_PLAIN : plan.flags + tile.batch * length + first;
  piece.next = next >= 0 && next + chunk <= length ? step : 0;
  return piece;
}

}  // namespace
}  // namespace LONGLLAVA_FORM
}  // namespace longllava
