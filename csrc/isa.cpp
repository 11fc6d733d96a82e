// Chooses the instruction set once, when the library is loaded. See isa.h.
#include "isa.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longllava {
namespace {

// AMX's tiles are 8 KB more for the system to save: on Linux a process asks for them. LONGLLAVA_AMX=0 forbids them. On a
// Xeon, at best, nano's two int8 layers of 8,192 rows take 1.0 and 0.6 ms with them, 2.7 and 1.3 with VNNI; attention of
// 2,048 queries to 38,000 keys in bf16 takes 87 ms, 491 by pairs.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  const char* wanted = getenv("LONGLLAVA_AMX");
  if (wanted != nullptr && strcmp(wanted, "0") == 0) return false;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned tile_int8_bf16 = 3u << 24 | 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile_int8_bf16) != tile_int8_bf16) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

struct Choice {
  Isa isa = Isa::portable;
  bool bf16 = false, vnni = false, amx = false;
  char error[256] = "";

  Choice() {
    bool avx2 = false, avx512 = false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    isa = avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
    const char* wanted = getenv("LONGLLAVA_ISA");
    if (wanted != nullptr && wanted[0] != '\0') {
      if (strcmp(wanted, "portable") == 0) {
        isa = Isa::portable;
      } else if (strcmp(wanted, "avx2") == 0 && avx2) {
        isa = Isa::avx2;
      } else if (strcmp(wanted, "avx512") == 0 && avx512) {
        isa = Isa::avx512;
      } else {
        snprintf(error, sizeof error,
                 "LONGLLAVA_ISA=%.20s: this processor runs portable%s%s; unset it or name one of these", wanted,
                 avx2 ? ", avx2" : "", avx512 ? ", avx512" : "");
      }
    }
#if defined(__x86_64__)
    bf16 = isa == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
    vnni = isa == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
    amx = bf16 && vnni && may_use_tiles();
#endif
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

Isa chosen_isa() { return choice().isa; }
bool has_avx512_bf16() { return choice().bf16; }
bool has_avx512_vnni() { return choice().vnni; }
bool has_amx() { return choice().amx; }

}  // namespace longllava

LONGLLAVA_EXPORT int longllava_abi() { return LONGLLAVA_ABI; }

LONGLLAVA_EXPORT const char* longllava_isa_name() {
  switch (longllava::chosen_isa()) {
    case longllava::Isa::avx512: return "avx512";
    case longllava::Isa::avx2: return "avx2";
    default: return "portable";
  }
}

LONGLLAVA_EXPORT int longllava_uses_amx() { return longllava::has_amx(); }

// NULL, or one sentence: LONGLLAVA_ISA names a form that does not exist or that this processor lacks.
LONGLLAVA_EXPORT const char* longllava_isa_error() {
  const char* error = longllava::choice().error;
  return error[0] != '\0' ? error : nullptr;
}
