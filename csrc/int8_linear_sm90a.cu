// The int8 product on Hopper: which of its kernels, and the launch. Compiled for sm_90a alone: build.py.
#include "int8_linear_sm90a.cuh"

using namespace longllava;

namespace {

template <class T, class S, bool BY_PUTS> int launch_product(const Int8ProductArguments& p) {
  TensorMap x, weight, y{};
  if (const int e = describe(x, 1, p.x, p.rows, p.inputs, S::ROWS, STAGE_INPUTS, 128)) return e;
  if (const int e = describe(weight, 1, p.weight, p.outputs, p.inputs, S::COLUMNS / S::CLUSTER, STAGE_INPUTS, 128))
    return e;
  if (BY_PUTS)
    if (const int e = describe(y, 2, p.y, p.rows, p.outputs, PUT_ROWS, PUT_COLUMNS, 64)) return e;
  const int64_t tall = S::ROWS * S::CLUSTER, most = p.processors < S::CLUSTER ? 1 : p.processors / S::CLUSTER;
  const int64_t n_tiles = (p.rows + tall - 1) / tall * ((p.outputs + S::COLUMNS - 1) / S::COLUMNS);
  return launch_clusters(int8_product<T, S, BY_PUTS>, n_tiles < most ? n_tiles : most, S::CLUSTER, THREADS, S::BYTES,
                         p.stream, x, weight, y, p);
}

template <class S> int of_dtype(const Int8ProductArguments& p) {
  const bool by_puts = p.outputs % 8 == 0;  // the accelerator writes rows that begin at multiples of 16 bytes
  if (p.dtype == 0) return launch_product<float, S, false>(p);
  if (p.dtype == 1) return by_puts ? launch_product<bf16, S, true>(p) : launch_product<bf16, S, false>(p);
  return by_puts ? launch_product<fp16, S, true>(p) : launch_product<fp16, S, false>(p);
}

}  // namespace

LONGLLAVA_EXPORT int longllava_cuda_int8_product(const Int8ProductArguments* p) {
  if (p->bytes != sizeof(Int8ProductArguments)) return -1;
  return of_dtype<Shape<1, 256, false, 2, 4, 3, false>>(*p);
}
