// Int8 linear layers on processors that multiply tiles of int8 (AMX: Sapphire Rapids and later).
//
// These have AVX512_BF16, too. Only the AVX-512 form holds code, and only where the compiler knows AMX. See
// int8_linear_vnni_kernels.cpp for the namespace.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-int8,avx512bf16")
#endif
#define LONGLLAVA_AMX
#define LONGLLAVA_BF16
#undef LONGLLAVA_FORM
#define LONGLLAVA_FORM avx512amx
#include "amx.h"
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
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
