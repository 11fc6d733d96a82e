// The int8 product on Hopper: the launch. Compiled for sm_90a alone: build.py.
#include "int8_linear_sm90a.cuh"

using namespace longllava;

namespace {

template <class T> int launch_product(const Int8ProductArguments& p) {
  TensorMap x, weight, y;
  if (const int e = describe(x, 1, p.x, p.rows, p.inputs, ROWS, STAGE_INPUTS, 128)) return e;
  if (const int e = describe(weight, 1, p.weight, p.outputs, p.inputs, COLUMNS / CLUSTER, STAGE_INPUTS, 128)) return e;
  if (const int e = describe(y, 2, p.y, p.rows, p.outputs, PUT_ROWS, PUT_COLUMNS, 64)) return e;
  const int64_t tall = ROWS * CLUSTER, most = p.processors < CLUSTER ? 1 : p.processors / CLUSTER;
  const int64_t n_tiles = (p.rows + tall - 1) / tall * ((p.outputs + COLUMNS - 1) / COLUMNS);
  return launch_clusters(int8_product<T>, n_tiles < most ? n_tiles : most, CLUSTER, THREADS, SHARED_BYTES, p.stream, x,
                         weight, y, p);
}

}  // namespace

LONGLLAVA_EXPORT int longllava_cuda_int8_product(const Int8ProductArguments* p) {
  if (p->bytes != sizeof(Int8ProductArguments)) return -1;
  return p->dtype == 1 ? launch_product<bf16>(*p) : launch_product<fp16>(*p);
}
