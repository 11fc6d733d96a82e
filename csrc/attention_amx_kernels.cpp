// Attention of a tile of queries, products in tiles of bf16 (attention_amx.h).
#define LONGLLAVA_PAIRS
#include "amx.h"
#if defined(LONGLLAVA_AMX)
#include "attention_amx.h"
#include "attention_forward.h"

namespace longllava {
namespace LONGLLAVA_FORM {

void attention_tile(const AttentionCall& call, int64_t index) { attend_tile<uint16_t, Tiles>(call, index); }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
LONGLLAVA_AMX_END
#endif
