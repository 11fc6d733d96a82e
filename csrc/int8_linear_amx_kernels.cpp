// Int8 linear layers on processors that multiply tiles of int8 (AMX: Sapphire Rapids and later). These have
// AVX512_BF16, too.
#define LONGLLAVA_BF16
#include "amx.h"
#if defined(LONGLLAVA_AMX)
#include "int8_product.h"

namespace longllava {
namespace LONGLLAVA_FORM {

void int8_tile(int64_t* rows, int64_t* outputs) {
  *rows = ROWS;
  *outputs = TILE_OUTPUTS;
}

void int8_fours_pack(void* plan) { pack_all<Fours>(*static_cast<const Int8Plan*>(plan)); }
void int8_fours_worker(void* plan, int64_t slot) { work<Fours>(*static_cast<Int8Plan*>(plan), slot); }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
LONGLLAVA_AMX_END
#endif
