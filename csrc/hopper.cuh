// What Hopper (sm_90a) has beyond other GPUs: tiles that the tensor memory accelerator fetches into shared memory,
// barriers that count bytes, products of a whole warpgroup, registers that warpgroups hand to each other.
//
// tests/ops/emulated/hopper.cuh holds the same names for a CPU. PTX ISA 8: "Asynchronous Warpgroup Level Matrix
// Instructions", "cp.async.bulk.tensor", "mbarrier".
#pragma once

#include <cuda.h>

#include <device.cuh>

namespace longllava {

// Rows of a matrix in global memory, as the accelerator finds them.
using TensorMap = CUtensorMap;

// All of a block's dynamic shared memory, at a place where every swizzle begins.
__device__ __forceinline__ unsigned char* aligned_shared() {
  extern __shared__ __align__(1024) unsigned char longllava_aligned[];
  return longllava_aligned;
}

__device__ __forceinline__ uint32_t shared_address(const void* x) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(x));
}

// Barriers in shared memory. A phase ends when `arrivals` have arrived and all expected bytes have come.
__device__ __forceinline__ void make_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// At the same barrier of block `rank` of the cluster. Neither this nor `wait` orders other blocks' plain reads and
// writes, which would flush and empty caches: only what the accelerator writes and products read is passed on.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
// Until the phase of that parity has ended; of a new barrier the phase of parity 1 has.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// A box of `map` whose first element is (row, column), zeros beyond the tensor's ends.
__device__ __forceinline__ void fetch(void* to, const TensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// The same for all blocks of the cluster in `blocks`, a bit each, to the same place of each.
__device__ __forceinline__ void fetch_for(uint16_t blocks, void* to, const TensorMap* map, int column, int row,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}
// What threads wrote to shared memory is seen by the accelerator after this.
__device__ __forceinline__ void show_to_accelerator() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void put(const TensorMap* map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(shared_address(from))
               : "memory");
}
__device__ __forceinline__ void end_puts() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all groups of puts but the last PENDING have read their shared memory; `wait_puts`: until all are written.
template <int PENDING> __device__ __forceinline__ void wait_read_puts() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void wait_puts() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Barriers of THREADS threads of a block, by number.
template <int THREADS> __device__ __forceinline__ void meet_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ __forceinline__ void pass(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

template <int REGISTERS> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Four 8 x 8 matrices of 16 bits; lane l says where row l % 8 of matrix l / 8 lies.
__device__ __forceinline__ void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Order of use: begin_products, multiply ..., end_products, and before sums are read wait_products and settle.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from reading sums before this place.
template <int N> __device__ __forceinline__ void settle(int (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(sum[i])::"memory");
}

#define LONGLLAVA_FOUR(i) "+r"(sum[i]), "+r"(sum[i + 1]), "+r"(sum[i + 2]), "+r"(sum[i + 3])
#define LONGLLAVA_EIGHT(i) LONGLLAVA_FOUR(i), LONGLLAVA_FOUR(i + 4)

// sum (64, 256) = a (64, 32) b (256, 32)^T, added to sum if `add`; int8 and int32. Thread t of the warpgroup holds of
// the rows 16 (t / 32) + t % 32 / 4 (sum[4 j], sum[4 j + 1]) and 8 further (sum[4 j + 2], sum[4 j + 3]) the columns
// 8 j + 2 (t % 4) and the next one.
__device__ __forceinline__ void multiply(int (&sum)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, add;\n}"
      : LONGLLAVA_EIGHT(0), LONGLLAVA_EIGHT(8), LONGLLAVA_EIGHT(16), LONGLLAVA_EIGHT(24),
        LONGLLAVA_EIGHT(32), LONGLLAVA_EIGHT(40), LONGLLAVA_EIGHT(48), LONGLLAVA_EIGHT(56),
        LONGLLAVA_EIGHT(64), LONGLLAVA_EIGHT(72), LONGLLAVA_EIGHT(80), LONGLLAVA_EIGHT(88),
        LONGLLAVA_EIGHT(96), LONGLLAVA_EIGHT(104), LONGLLAVA_EIGHT(112), LONGLLAVA_EIGHT(120)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

#undef LONGLLAVA_EIGHT
#undef LONGLLAVA_FOUR

// The driver's function, found at run time: the library is not linked against the driver.
inline decltype(&cuTensorMapEncodeTiled) map_encoding_function() {
  static void* found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult state = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    code_of(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &state));
#else
    code_of(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &state));
#endif
    return state == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// (rows, columns) without gaps, elements of `size` bytes, fetched or written in boxes, which lie in shared memory by
// rows, their pieces of 16 bytes mixed within `swizzle` bytes. Returns an error, 0 if none.
inline int describe(TensorMap& map, int size, const void* data, int64_t rows, int64_t columns, int box_rows,
                    int box_columns, int swizzle) {
  if (map_encoding_function() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns * size)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result = map_encoding_function()(
      &map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : cudaErrorInvalidValue;
}

// `clusters` times `blocks` blocks, those of a cluster at once on the device.
template <class... Parameters, class... Arguments>
int launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads, int64_t bytes,
                    void* stream, const Arguments&... arguments) {
  if (const int refused = ask_for_shared(kernel, bytes)) return refused;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return code_of(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace longllava
