// What the kernels by tiles (AMX) share. Include from *_amx_kernels.cpp only.
#pragma once

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
