// Attention of a tile of queries, products in tiles of bf16 (attention_amx.h).
//
// Only the AVX-512 form holds code, and only where the compiler knows AMX. See attention_bf16_kernels.cpp for the
// namespace.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16")
#endif
#define LONGLLAVA_PAIRS
#define LONGLLAVA_AMX
#undef LONGLLAVA_FORM
#define LONGLLAVA_FORM avx512amx
#include "attention_amx.h"
#include "attention_forward.h"

namespace longllava {
namespace LONGLLAVA_FORM {

void attention_tile(const AttentionCall& call, int64_t index) { attend_tile<uint16_t, Tiles>(call, index); }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
