// Entry points of the selective scan on a GPU, its one-token step, and what joins spans of time.
#include "selective_scan_backward_shared.cuh"
#include "selective_scan_forward_shared.cuh"

namespace longllava {

constexpr int SMALL_THREADS = 128;

// From what each span adds to an empty state (pieces, replaced) and its sum of steps to the state before each; the
// state after the last goes to `end`, if wanted. In reverse: from the last span to the first, for gradients.
__global__ void __launch_bounds__(SMALL_THREADS)
scan_join_kernel(const __grid_constant__ ScanArguments p, const float* state, float* end, int reverse) {
  const int64_t one_state = p.channels * p.states;
  const int64_t id = int64_t(blockIdx.x) * SMALL_THREADS + threadIdx.x;
  if (id >= p.batch * one_state) return;
  const int64_t batch = id / one_state, place = id % one_state, channel = place / p.states;
  const float a = p.A[place] * LOG2E;
  float h = state != nullptr ? state[id] : 0.0f;
  for (int64_t i = 0; i < p.n_spans; ++i) {
    const int64_t span = batch * p.n_spans + (reverse ? p.n_spans - 1 - i : i);
    const float sum = p.sums[span * p.channels + channel], added = p.pieces[span * one_state + place];
    p.pieces[span * one_state + place] = h;
    // NaN marks a reset; a step that is NaN itself has made what is added NaN, and that stays
    h = sum == sum ? fmaf(fast_exp2(sum * a), h, added) : added;
  }
  if (end != nullptr) end[id] = h;
}

int scan_join(const ScanArguments& p, const float* state, float* end, bool reverse) {
  const int64_t blocks = (p.batch * p.channels * p.states + SMALL_THREADS - 1) / SMALL_THREADS;
  return launch(scan_join_kernel, blocks, SMALL_THREADS, 0, p.stream, p, state, end, reverse ? 1 : 0);
}

// One token. Four lanes hold a channel, each four states; everything is asked for at once, and `end` may be `state`.
template <class T>
__global__ void __launch_bounds__(SMALL_THREADS) scan_step_kernel(const __grid_constant__ ScanArguments p) {
  constexpr int CHANNELS = SMALL_THREADS / 4;
  const int64_t n_blocks = (p.channels + CHANNELS - 1) / CHANNELS;
  const int64_t batch = blockIdx.x / n_blocks, channel = blockIdx.x % n_blocks * CHANNELS + threadIdx.x / 4;
  const int first = threadIdx.x % 4 * 4;
  const bool exists = channel < p.channels;
  const bool real = exists && (p.flags == nullptr || p.flags[batch] != FLAG_PADDING);
  const auto element = [&](const Rows& rows) {
    if (!real || rows.data == nullptr) return 0.0f;
    return to_float(static_cast<const T*>(rows.data)[batch * rows.batch_stride + channel]);
  };
  const auto row = [&](const Rows& rows) { return static_cast<const T*>(rows.data) + batch * rows.batch_stride; };
  float a[4], h[4] = {};
  load_states(p.A, channel, first, p, a);
  const int64_t one_state = p.channels * p.states;
  if (p.state != nullptr) load_states(p.state + batch * one_state, channel, first, p, h);
  const Quad<T> b = load_row(row(p.B), first, real, p.wide, p.states);
  const Quad<T> c = load_row(row(p.C), first, real, p.wide, p.states);
  const float u = element(p.u), z = element(p.z);
  float d = element(p.delta);
  if (exists && p.bias != nullptr) d += p.bias[channel];
  const float skip = exists && p.D != nullptr ? p.D[channel] : 0.0f;
  if (p.softplus) d = softplus(d);
  d = real ? d : 0.0f;
  float y = 0.0f;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    h[s] = fmaf(fast_exp2(d * (a[s] * LOG2E)), h[s], d * u * to_float(b.v[s]));
    y = fmaf(h[s], to_float(c.v[s]), y);
  }
  store_states(p.end + batch * one_state, channel, first, p, h);
  y += __shfl_xor_sync(0xffffffffu, y, 1);
  y += __shfl_xor_sync(0xffffffffu, y, 2);
  y = fmaf(skip, u, y);
  if (p.z.data != nullptr) y *= z * sigmoid(z);
  const T out = from_float<T>(real ? y : 0.0f);
  if (first == 0 && exists) static_cast<T*>(p.y.data)[batch * p.channels + channel] = out;
  if (p.maxima != nullptr) {
    int most = real ? magnitude(to_float(out)) : 0;
    for (int distance = 16; distance > 2; distance /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, distance));
    if (threadIdx.x % 32 == 0 && most != 0) atomic_max_magnitude(p.maxima + batch, most);
  }
}

template <class T> int scan_step(const ScanArguments& p) {
  constexpr int CHANNELS = SMALL_THREADS / 4;
  const int64_t blocks = p.batch * ((p.channels + CHANNELS - 1) / CHANNELS);
  return launch(scan_step_kernel<T>, blocks, SMALL_THREADS, 0, p.stream, p);
}

}  // namespace longllava

using namespace longllava;

// Both return 0, or CUDA's error code, or -1 when the caller's struct is of another version.
LONGLLAVA_EXPORT int longllava_cuda_scan_forward(const ScanArguments* args) {
  if (args->bytes != sizeof(ScanArguments)) return -1;
  const ScanArguments& p = *args;
  if (p.length == 1 && p.saved == nullptr)
    return p.dtype == 0 ? scan_step<float>(p) : p.dtype == 1 ? scan_step<bf16>(p) : scan_step<fp16>(p);
  return p.dtype == 0 ? scan_forward_fp32(p) : p.dtype == 1 ? scan_forward_bf16(p) : scan_forward_fp16(p);
}

LONGLLAVA_EXPORT int longllava_cuda_scan_backward(const ScanArguments* args) {
  if (args->bytes != sizeof(ScanArguments)) return -1;
  const ScanArguments& p = *args;
  return p.dtype == 0 ? scan_backward_fp32(p) : p.dtype == 1 ? scan_backward_bf16(p) : scan_backward_fp16(p);
}

// Bytes of shared memory that a block of the forward kernel needs at least, for a `dtype` of ScanArguments.
LONGLLAVA_EXPORT int64_t longllava_cuda_scan_forward_bytes(int dtype) {
  if (dtype == 0) return sizeof(ForwardShared<float, SMALL_TOKENS, SMALL_DEPTH>);
  return sizeof(ForwardShared<bf16, SMALL_TOKENS, SMALL_DEPTH>);
}

// Bytes of shared memory that a block of 64 channels needs backward, or one of 32.
LONGLLAVA_EXPORT int64_t longllava_cuda_scan_backward_bytes(int channels) {
  return channels == 64 ? sizeof(BackwardShared<64>) : sizeof(BackwardShared<32>);
}

// Bytes of shared memory that a block of the forward kernel needs for int8 rows.
LONGLLAVA_EXPORT int64_t longllava_cuda_scan_int8_bytes() { return INT8_BYTES<bf16, SCAN_CHUNK, 1>; }
