// Attention of a tile of queries, products in pairs of bf16: processors with AVX512_BF16 (Zen 4, Cooper Lake).
//
// Only the AVX-512 form holds code. It has a namespace of its own, since the compiler may put the instruction into
// any function here: the linker must not take one of these for its twin in the plain AVX-512 form.
#if defined(__AVX512F__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512bf16")
#endif
#define LONGLLAVA_PAIRS
#undef LONGLLAVA_FORM
#define LONGLLAVA_FORM avx512bf16
#include "attention_forward.h"

namespace longllava {
namespace LONGLLAVA_FORM {

void attention_tile(const AttentionCall& call, int64_t index) { attend_tile<uint16_t, Pair>(call, index); }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
