// The C interface of the selective scan on a GPU, and what its kernels share.
//
//   d = softplus(delta + bias);  h = exp(d A) h + d u B;  y = (C . h + D u) silu(z)
//
// longllava/ops/selective_scan/cuda_launch.py fills ScanArguments field by field, in this order, 8 bytes each.
#pragma once

#include "rows.cuh"

namespace longllava {

constexpr int SCAN_STATES = 16;    // that a channel has here; fewer are filled up with zeros
constexpr int SCAN_CHANNELS = 64;  // of a block
constexpr int SCAN_CHUNK = 32;     // tokens between two saved states
constexpr int SMALL_TOKENS = 16, SMALL_DEPTH = 2;  // of a tile, and tiles ahead, where there is no room for more

// When the forward kernel begins: after the kernel ahead of it in the stream; while that ends; the same, and brings its
// first tiles into the second cache meanwhile.
enum Early : int64_t { NOT_EARLY = 0, EARLY = 1, EARLY_WITH_PREFETCH = 2 };

struct ScanArguments {
  int64_t bytes;  // sizeof(ScanArguments), to catch a caller of another version
  int64_t dtype;  // of all Rows: 0 fp32, 1 bf16, 2 fp16
  int64_t batch, length, channels, states, softplus;
  int64_t n_spans, span;  // time is cut in so many spans of so many tokens, a multiple of SCAN_CHUNK
  int64_t wide;           // rows of channels may be read 16 bytes at a time, those of states (16) four elements
  int64_t block;          // channels of a block, backward: 64, or 32 where shared memory is short
  int64_t early;          // an Early
  void* stream;
  Rows u, delta, z, B, C, y;    // z.data may be null
  const float *A, *D, *bias;    // (E, N), (E), (E); D and bias may be null
  const float* state;           // (B, E, N) or null
  const int8_t* flags;          // (B, L) Flag, or null: all plain
  float* end;                   // (B, E, N), may be state
  float* saved;                 // (B, chunks, E, N) before each SCAN_CHUNK tokens, or null; backward reads it
  float *pieces, *sums;         // (B, spans, E, N), (B, spans, E): scratch where n_spans > 1, forward and backward
  float* maxima;                // (B, L) zeros: the largest |y| of a token goes here, if it is not null
  int8_t* rows;                 // (B, L, E): y in int8 instead of y, if it is not null; needs maxima, scales, arrived
  float* scales;                // (B, L)
  int* arrived;                 // (B, tiles of SCAN_CHUNK tokens) zeros: blocks that have added to a tile's maxima
  // backward only; gradients are fp32 partial sums where a shape says so
  Rows grad_y;
  void *grad_u, *grad_delta, *grad_z;  // (B, L, E) in the dtype of Rows
  const float* grad_end;               // (B, E, N) or null
  float *grad_A, *grad_D, *grad_bias;  // (B, spans, E, N), (B, spans, E), (B, spans, E); the last two may be null
  float *grad_B, *grad_C;              // (blocks of channels, B, L, N)
  float* grad_start;                   // (B, E, N)
};

// log(1 + exp(x)) to 2e-7 of its value: log1p as a polynomial that a fit on [0, 1] gave. A logarithm of 1 + e would
// lose the digits of a small e.
__device__ __forceinline__ float softplus(float x) {
  const float e = fast_exp2(-fabsf(x) * LOG2E);
  float p = fmaf(0.0052326936f, e, -0.02950524f);
  p = fmaf(p, e, 0.07822596f);
  p = fmaf(p, e, -0.13663247f);
  p = fmaf(p, e, 0.19106008f);
  p = fmaf(p, e, -0.24842982f);
  p = fmaf(p, e, 0.33319098f);
  p = fmaf(p, e, -0.49999493f);
  p = fmaf(p, e, 0.99999994f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

__device__ __forceinline__ float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-x * LOG2E)); }

// What a block works on: its row of the batch, span of time, first channel, tokens.
struct Place {
  int64_t batch, span, channel, begin, end;
  __device__ Place(const ScanArguments& p, int channels) {
    const int64_t n_blocks = (p.channels + channels - 1) / channels;
    channel = blockIdx.x % n_blocks * channels;
    span = blockIdx.x / n_blocks % p.n_spans;
    batch = blockIdx.x / n_blocks / p.n_spans;
    begin = span * p.span;
    end = begin + p.span < p.length ? begin + p.span : p.length;
  }
};

// Four states of a channel, from an (E, N) tensor; zeros where there are none.
__device__ __forceinline__ void load_states(const float* x, int64_t channel, int first, const ScanArguments& p,
                                            float (&out)[4]) {
  if (channel < p.channels && p.states == SCAN_STATES) {
    const float4 four = *reinterpret_cast<const float4*>(x + channel * SCAN_STATES + first);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
    return;
  }
#pragma unroll
  for (int s = 0; s < 4; ++s)
    out[s] = channel < p.channels && first + s < p.states ? x[channel * p.states + first + s] : 0.0f;
}

__device__ __forceinline__ void store_states(float* x, int64_t channel, int first, const ScanArguments& p,
                                             const float (&in)[4]) {
  if (channel >= p.channels) return;
  if (p.states == SCAN_STATES) {
    *reinterpret_cast<float4*>(x + channel * SCAN_STATES + first) = make_float4(in[0], in[1], in[2], in[3]);
    return;
  }
#pragma unroll
  for (int s = 0; s < 4; ++s)
    if (first + s < p.states) x[channel * p.states + first + s] = in[s];
}

// Four columns of a row of states (B or C); zeros where there are none, or the token is not wanted.
template <class T>
__device__ __forceinline__ Quad<T> load_row(const T* row, int first, bool wanted, bool wide, int64_t states) {
  Quad<T> out{};
  if (wanted && wide) return *reinterpret_cast<const Quad<T>*>(row + first);
#pragma unroll
  for (int s = 0; s < 4; ++s)
    if (wanted && first + s < states) out.v[s] = row[first + s];
  return out;
}

int scan_forward_fp32(const ScanArguments& p);
int scan_forward_bf16(const ScanArguments& p);
int scan_forward_fp16(const ScanArguments& p);
int scan_backward_fp32(const ScanArguments& p);
int scan_backward_bf16(const ScanArguments& p);
int scan_backward_fp16(const ScanArguments& p);
int scan_join(const ScanArguments& p, const float* state, float* end, bool reverse);

}  // namespace longllava
