// Int8 linear layers on processors that multiply int8 in fours (AVX512_VNNI: Ice Lake, Zen 4 and later).
//
// Only the AVX-512 form holds code. It has a namespace of its own, since the compiler may put the instruction into any
// function here: the linker must not take one of these for its twin in the plain AVX-512 form.
#if defined(__AVX512F__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512vnni")
#endif
#define LONGLLAVA_VNNI
#undef LONGLLAVA_FORM
#define LONGLLAVA_FORM avx512vnni
#include "int8_product.h"

namespace longllava {
namespace LONGLLAVA_FORM {

void int8_fours_worker(void* plan, int64_t slot) { work<Fours>(*static_cast<Int8Plan*>(plan), slot); }

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
