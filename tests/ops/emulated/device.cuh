// csrc/device.cuh for a CPU: the CUDA kernels as plain C++, so that their arithmetic and indices are tested where there
// is no GPU. A block's threads are fibers of one thread of the CPU; they change at barriers and shuffles only. Blocks
// run one after the other. Copies into shared memory happen when they are waited for, not before, so that a wait that
// comes too early is seen. Every block begins with shared memory full of NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define LONGLLAVA_EXPORT extern "C" __attribute__((visibility("default")))
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {

struct Copy { void* to; const void* from; bool wanted; };

struct Late { void* to; const void* from; int64_t bytes; };
inline std::vector<Late> kernel_ahead;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  std::vector<std::vector<Copy>> groups{1};  // copies asked for; the last group is open
};

// What the threads of a block, or of a warp, wait for.
struct Barrier { int arrived = 0, phase = 0; };

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  Barrier barriers[16];
  std::vector<Barrier> warps;
  std::vector<float> exchanged;
  int running = 0, waiting = 0;  // waiting: threads that have waited for the kernel ahead
  std::function<void()> body;
};

inline Block* block = nullptr;
struct Index { unsigned x; };
inline Index thread_index, block_index;

inline void pause() { swapcontext(&block->fibers[block->running]->context, &block->scheduler); }

inline void meet(Barrier& barrier, int threads) {
  const int phase = barrier.phase;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.phase;
    return;
  }
  while (barrier.phase == phase) pause();
}

inline void meet_warp() {
  const int warp = thread_index.x / 32, threads = min<int>(32, block->fibers.size() - warp * 32);
  meet(block->warps[warp], threads);
}

inline void start() {
  block->body();
  block->fibers[block->running]->done = true;
  pause();
}

inline void fill(Block& now, int threads, int64_t bytes, const std::function<void()>& body) {
  now.body = body;
  now.warps.resize((threads + 31) / 32);
  now.exchanged.resize(threads);
  now.shared.assign(bytes + 128, 0xff);
  for (int i = 0; i < threads; ++i) {
    now.fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *now.fibers.back();
    fiber.stack.resize(64 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
}

// Every thread has a turn; whether any is left.
inline bool turn(Block& now, unsigned id, bool backward) {
  block = &now;
  block_index.x = id;
  bool busy = false;
  const int threads = int(now.fibers.size());
  for (int k = 0; k < threads; ++k) {
    const int i = backward ? threads - 1 - k : k;
    if (now.fibers[i]->done) continue;
    busy = true;
    now.running = i;
    thread_index.x = i;
    swapcontext(&now.scheduler, &now.fibers[i]->context);
  }
  return busy;
}

// Blocks first .. first + count - 1 together. The last has a turn in every round, each before it fewer, so that they get
// far apart.
inline void run_blocks(unsigned first, unsigned count, int threads, int64_t bytes, const std::function<void()>& body) {
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned i = 0; i < count; ++i) {
    blocks.push_back(std::make_unique<Block>());
    fill(*blocks[i], threads, bytes, body);
  }
  // threads run in either order by turns, so that neither kind of warps is always the first
  unsigned round = 0;
  for (unsigned busy = count; busy > 0; ++round) {
    busy = 0;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned every = count - i;
      busy += round % every != 0 || turn(*blocks[i], first + i, round / every % 2 != 0);
    }
  }
  block = nullptr;
}

inline float exchange(float x, int from) {
  const int base = thread_index.x / 32 * 32;
  block->exchanged[thread_index.x] = x;
  meet_warp();
  const float got = block->exchanged[base + from];
  meet_warp();
  return got;
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index

inline float __shfl_xor_sync(unsigned, float x, int distance) {
  return emulated::exchange(x, (emulated::thread_index.x % 32) ^ distance);
}
inline int __shfl_xor_sync(unsigned mask, int x, int distance) {
  float bits;
  std::memcpy(&bits, &x, 4);
  bits = __shfl_xor_sync(mask, bits, distance);
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __shfl_sync(unsigned, float x, int lane) { return emulated::exchange(x, lane); }
inline float __shfl_down_sync(unsigned, float x, int distance) {
  const int lane = emulated::thread_index.x % 32;
  return emulated::exchange(x, lane + distance < 32 ? lane + distance : lane);
}
inline unsigned __ballot_sync(unsigned, bool yes) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(emulated::exchange(yes ? 1.0f : 0.0f, lane) != 0.0f) << lane;
  return bits;
}
inline void __syncthreads() { emulated::meet(emulated::block->barriers[0], int(emulated::block->fibers.size())); }
inline void __syncwarp() { emulated::meet_warp(); }

namespace longllava {

struct bf16 { uint16_t bits; };
using fp16 = _Float16;

constexpr float LOG2E = 1.4426950408889634f;

template <class T, int N> struct alignas(N * sizeof(T)) Several { T v[N]; };
template <class T> using Quad = Several<T, 4>;
template <class T> using Pair = Several<T, 2>;

template <class T> struct PairBits { uint32_t bits; };
template <> struct alignas(8) PairBits<float> { float x, y; };

inline float to_float(float x) { return x; }
inline float to_float(fp16 x) { return float(x); }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <class T> inline float2 to_floats(PairBits<T> x) {
  T both[2];
  std::memcpy(both, &x, sizeof(both));
  return {to_float(both[0]), to_float(both[1])};
}

template <class T> inline T from_float(float x) { return T(x); }
template <> inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T> inline Pair<T> pair_from(float x, float y, T) { return {{from_float<T>(x), from_float<T>(y)}}; }

template <class T> inline PairBits<T> bits_from(float x, float y, T) {
  const T both[2] = {from_float<T>(x), from_float<T>(y)};
  PairBits<T> two;
  std::memcpy(&two, both, sizeof(both));
  return two;
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

inline void copy_async_16(void* shared, const void* global, bool wanted) {
  emulated::block->fibers[emulated::block->running]->groups.back().push_back({shared, global, wanted});
}
inline void commit_copies() { emulated::block->fibers[emulated::block->running]->groups.emplace_back(); }
template <int PENDING> inline void wait_copies() {
  auto& groups = emulated::block->fibers[emulated::block->running]->groups;
  while (int(groups.size()) - 1 > PENDING) {
    for (const emulated::Copy& copy : groups.front()) {
      if (copy.wanted) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

template <int THREADS> inline void meet() { emulated::meet(emulated::block->barriers[1], THREADS); }

inline int magnitude(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

inline int warp_max(int x) {
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

inline void atomic_max_magnitude(float* at, int x) {
  const int most = max(magnitude(*at), x);
  std::memcpy(at, &most, 4);
}

inline float divide(float x, float by) { return x / by; }
inline int nearest(float x) { return int(std::nearbyint(x)); }

inline void arrive(int* counter) { ++*counter; }
inline void wait_for_blocks(const int* counter, int n_blocks) {
  while (*counter < n_blocks) emulated::pause();
}
inline float load_of_others(const float* x) { return *x; }

// What the kernel ahead writes is there once all threads of a block have waited for it: never where one does not wait.
inline void wait_for_kernel_ahead() {
  int& waiting = emulated::block->waiting;
  const int threads = int(emulated::block->fibers.size());
  ++waiting;
  for (int turns = 0; waiting < threads && turns < 100; ++turns) emulated::pause();
  if (waiting < threads) return;
  for (const emulated::Late& late : emulated::kernel_ahead) std::memcpy(late.to, late.from, late.bytes);
  emulated::kernel_ahead.clear();
}
inline void let_next_kernel_begin() {}
inline void prefetch(const void* x) { static_cast<void>(*static_cast<const volatile char*>(x)); }

inline int64_t shared_memory_limit() { return 227 * 1024; }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t bytes, void*,
           const Arguments&... arguments) {
  for (int64_t i = 0; i < blocks; ++i)
    emulated::run_blocks(unsigned(i), 1, threads, bytes, [&] { kernel(arguments...); });
  return 0;
}

template <class... Parameters, class... Arguments>
int launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t bytes, void* stream,
                 const Arguments&... arguments) {
  return launch(kernel, blocks, threads, bytes, stream, arguments...);
}

template <class... Parameters, class... Arguments>
int launch_together(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t bytes, void*,
                    const Arguments&... arguments) {
  emulated::run_blocks(0, unsigned(blocks), threads, bytes, [&] { kernel(arguments...); });
  return 0;
}

inline unsigned char* dynamic_shared() {
  const uintptr_t at = reinterpret_cast<uintptr_t>(emulated::block->shared.data());
  return reinterpret_cast<unsigned char*>((at + 127) / 128 * 128);
}

}  // namespace longllava

// A test tells what the kernel ahead of the next launch will have written.
LONGLLAVA_EXPORT __attribute__((used)) inline void longllava_emulated_kernel_ahead(void* to, const void* from,
                                                                                   int64_t bytes) {
  emulated::kernel_ahead.push_back({to, from, bytes});
}

using cudaError_t = int;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
