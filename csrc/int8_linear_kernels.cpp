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

void int8_quantize_task(void* opaque, int64_t task) {
  const Int8Arguments& a = static_cast<const Int8Plan*>(opaque)->args;
  const int64_t begin = task * INT8_SMALL_CHUNK;
  const int64_t end = begin + INT8_SMALL_CHUNK < a.rows ? begin + INT8_SMALL_CHUNK : a.rows;
  for (int64_t row = begin; row < end; ++row) prepare_row(a, row, a.values + row * a.inputs, a.values_scale + row);
}

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
