// Attention of a tile of queries, products in fp32: any processor, either type of input.
#include "attention_forward.h"

namespace longllava {
namespace LONGLLAVA_FORM {

void attention_tile_float(const AttentionCall& call, int64_t index) { attend_tile<float, Single>(call, index); }
void attention_tile_bf16(const AttentionCall& call, int64_t index) { attend_tile<uint16_t, Single>(call, index); }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
