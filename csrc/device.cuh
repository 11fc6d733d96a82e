// What the CUDA kernels need of the device: element types, the special-function unit, copies into shared memory.
//
// tests/ops/emulated/device.cuh holds the same names for a CPU, so that the kernels' arithmetic and indices are tested
// where there is no GPU: therefore kernels use these and no intrinsics of their own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define LONGLLAVA_EXPORT extern "C" __attribute__((visibility("default")))

namespace longllava {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr float LOG2E = 1.4426950408889634f;

template <class T, int N> struct alignas(N * sizeof(T)) Several { T v[N]; };
template <class T> using Quad = Several<T, 4>;
template <class T> using Pair = Several<T, 2>;

// Two elements as they lie in memory, in one register where they fit: nothing is unpacked until it is used.
template <class T> struct PairBits { uint32_t bits; };
template <> struct alignas(8) PairBits<float> { float x, y; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

__device__ __forceinline__ float2 to_floats(PairBits<float> x) { return make_float2(x.x, x.y); }
__device__ __forceinline__ float2 to_floats(PairBits<bf16> x) {
  return make_float2(__uint_as_float(x.bits << 16), __uint_as_float(x.bits & 0xffff0000u));
}
__device__ __forceinline__ float2 to_floats(PairBits<fp16> x) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x.bits));
}

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float x) { return __float2half_rn(x); }

// Two conversions are one instruction.
__device__ __forceinline__ Pair<float> pair_from(float x, float y, float) { return {{x, y}}; }
__device__ __forceinline__ Pair<bf16> pair_from(float x, float y, bf16) {
  const __nv_bfloat162 a = __floats2bfloat162_rn(x, y);
  return {{a.x, a.y}};
}
__device__ __forceinline__ Pair<fp16> pair_from(float x, float y, fp16) {
  const __half2 a = __floats2half2_rn(x, y);
  return {{a.x, a.y}};
}

__device__ __forceinline__ PairBits<float> bits_from(float x, float y, float) { return {x, y}; }
__device__ __forceinline__ PairBits<bf16> bits_from(float x, float y, bf16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
  return {*reinterpret_cast<const uint32_t*>(&two)};
}
__device__ __forceinline__ PairBits<fp16> bits_from(float x, float y, fp16) {
  const __half2 two = __floats2half2_rn(x, y);
  return {*reinterpret_cast<const uint32_t*>(&two)};
}

// One instruction each. Without .ftz the compiler adds three for results below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from global to shared memory without a register; zeros if not `wanted` (the address is then not read).
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool wanted) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A barrier of THREADS threads of the block that may stand at different places of the code.
template <int THREADS> __device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// |x| as an integer of the same order, with NaN above infinity: a maximum of these loses neither.
__device__ __forceinline__ int magnitude(float x) { return __float_as_int(x) & 0x7fffffff; }

// The largest of a whole warp's.
__device__ __forceinline__ int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }

// The largest magnitude; the order of arrival changes nothing.
__device__ __forceinline__ void atomic_max_magnitude(float* at, int x) { atomicMax(reinterpret_cast<int*>(at), x); }

__device__ __forceinline__ float divide(float x, float by) { return __fdiv_rn(x, by); }
// To the nearest integer, ties to even.
__device__ __forceinline__ int nearest(float x) { return __float2int_rn(x); }

// For blocks that are launched together. One thread tells the others that its block has come so far: what the block's
// threads wrote before they last met is then seen by whoever has waited.
__device__ __forceinline__ void arrive(int* counter) {
  __threadfence();
  atomicAdd(counter, 1);
}
__device__ __forceinline__ void wait_for_blocks(const int* counter, int n_blocks) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < n_blocks);
}
// What other blocks wrote: not from this processor's own cache.
__device__ __forceinline__ float load_of_others(const float* x) { return __ldcg(x); }

// For kernels that `launch_early` starts. The blocks of such a kernel may begin while those of the one before it in the
// stream still end: before this they touch no memory that another kernel writes or reads, after it all is there. Every
// thread waits, so that a kernel never ends before the one ahead of it. Otherwise, and before Hopper, there is no wait.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel that follows may take the room of this one's blocks as they end. It still waits for all that they write.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Into the cache that all processors share: nothing is read, so that another kernel may still write there.
__device__ __forceinline__ void prefetch(const void* x) { asm volatile("prefetch.global.L2 [%0];" ::"l"(x)); }

// Bytes that a block may have of this device's shared memory.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// An error as entries return it. The runtime forgets it too: torch would raise it after a later kernel.
inline int code_of(cudaError_t error) {
  cudaGetLastError();
  return static_cast<int>(error);
}

// A block gets more than 48 KB of shared memory only when asked for. It is asked for at every launch, since the answer
// belongs to the current device.
template <class Kernel> int ask_for_shared(Kernel kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return 0;
  return code_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// Launches a kernel with `bytes` of dynamic shared memory; returns the launch's error, 0 if none.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t bytes, void* stream,
           const Arguments&... arguments) {
  if (const int refused = ask_for_shared(kernel, bytes)) return refused;
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

// Whether a kernel's code waits for the kernel ahead, which it does where it was compiled for Hopper or later, PTX
// included. A graph that is being captured gets plain launches.
template <class Kernel> bool may_begin_early(Kernel kernel, void* stream) {
  cudaFuncAttributes of{};
  cudaStreamCaptureStatus capture{};
  const bool waits = cudaFuncGetAttributes(&of, kernel) == cudaSuccess && of.ptxVersion >= 90;
  if (waits && cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture) == cudaSuccess)
    return capture == cudaStreamCaptureStatusNone;
  cudaGetLastError();
  return false;
}

// `launch` of a kernel that waits by `wait_for_kernel_ahead`, which may begin before the kernel ahead has ended.
template <class... Parameters, class... Arguments>
int launch_early(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t bytes, void* stream,
                 const Arguments&... arguments) {
  if (!may_begin_early(kernel, stream)) return launch(kernel, blocks, threads, bytes, stream, arguments...);
  if (const int refused = ask_for_shared(kernel, bytes)) return refused;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early, config.numAttrs = 1;
  return code_of(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// `launch` with all blocks at once on the device, so that they may wait for each other; an error where they do not fit.
template <class... Parameters, class... Arguments>
int launch_together(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t bytes, void* stream,
                    const Arguments&... arguments) {
  if (const int refused = ask_for_shared(kernel, bytes)) return refused;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return code_of(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                             dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers, bytes,
                                             static_cast<cudaStream_t>(stream)));
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char longllava_shared[];
  return longllava_shared;
}

}  // namespace longllava
