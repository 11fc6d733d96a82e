// Int8 linear layers, and quantisation of rows alone. See int8_product.h.
#include "int8_product.h"

namespace longllava {
namespace LONGLLAVA_FORM {

void int8_tile(int64_t* rows, int64_t* outputs) {
  *rows = ROWS;
  *outputs = TILE_OUTPUTS;
}

void int8_pairs_worker(void* plan, int64_t slot) { work<Pairs>(*static_cast<Int8Plan*>(plan), slot); }
void int8_fours_worker(void* plan, int64_t slot) { work<Fours>(*static_cast<Int8Plan*>(plan), slot); }

void int8_pairs_pack(void* plan) { pack_all<Pairs>(*static_cast<const Int8Plan*>(plan)); }
void int8_fours_pack(void* plan) { pack_all<Fours>(*static_cast<const Int8Plan*>(plan)); }

namespace {

template <class T>
void rotate_rows(const Int8Arguments& a, int64_t begin, int64_t end) {
  alignas(64) float rotated[ROTATED_MAX_WIDTH];
  for (int64_t row = begin; row < end; ++row) {
    rotate_row(static_cast<const T*>(a.x) + row * a.x_row, a.inputs, rotated);
    if (a.values != nullptr) {
      quantise_row<false>(rotated, a.inputs, nullptr, a.values + row * a.inputs, a.values_scale + row);
      continue;
    }
    T* y = static_cast<T*>(a.y) + row * a.inputs;
    int64_t k = 0;
    for (; k + WIDTH <= a.inputs; k += WIDTH) store(y + k, load(rotated + k));
    if (k < a.inputs) store_some(y + k, load_some(rotated + k, int(a.inputs - k)), int(a.inputs - k));
  }
}

}  // namespace

void int8_quantize_task(void* opaque, int64_t task) {
  const Int8Arguments& a = static_cast<const Int8Plan*>(opaque)->args;
  const int64_t begin = task * INT8_SMALL_CHUNK;
  const int64_t end = begin + INT8_SMALL_CHUNK < a.rows ? begin + INT8_SMALL_CHUNK : a.rows;
  if (a.rotated) {
    a.x_dtype == DTYPE_FLOAT32 ? rotate_rows<float>(a, begin, end) : rotate_rows<uint16_t>(a, begin, end);
    return;
  }
  for (int64_t row = begin; row < end; ++row) prepare_row<false>(a, row, a.values + row * a.inputs, a.values_scale + row);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
