// What the kernels by tiles (AMX) share. The first include of a *_amx_kernels.cpp: what follows is compiled for AMX, to
// LONGLLAVA_AMX_END. Only the AVX-512 form holds code, and only where the compiler knows AMX; its namespace is its own,
// as int8_linear_vnni_kernels.cpp says.
#pragma once

#include "isa.h"

#if defined(__AVX512F__) && defined(LONGLLAVA_HAS_AMX)
#define LONGLLAVA_AMX
#undef LONGLLAVA_FORM
#define LONGLLAVA_FORM avx512amx
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-int8,amx-bf16,avx512bf16"))), apply_to = function)
#define LONGLLAVA_AMX_END _Pragma("clang attribute pop")
#else
#pragma GCC target("amx-tile,amx-int8,amx-bf16,avx512bf16")
#define LONGLLAVA_AMX_END
#endif

#include <immintrin.h>

#include "vector.h"

namespace longllava {
namespace LONGLLAVA_FORM {

// All tiles are 16 rows of 64 bytes.
struct TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC's tile instructions do not say that they read memory: everything has to be in its place before them.
LONGLLAVA_INLINE void memory_is_read() { asm volatile("" ::: "memory"); }

// Tiles can be used while it lives.
class TileRegisters {
 public:
  TileRegisters() {
    const TileConfiguration configuration;
    asm volatile("" : : "r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

}  // namespace LONGLLAVA_FORM
}  // namespace longllava
#endif
