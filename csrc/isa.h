// One source, several instruction sets, chosen when the library is loaded.
//
// csrc/build.py compiles every *_kernels.cpp once per form (portable, and on x86-64 also AVX2 and AVX-512)
// with its own -m flags and -DLONGLLAVA_FORM=<form>. A kernel file defines its functions inside
// `namespace longllava::LONGLLAVA_FORM`; the file that holds the extern "C" entry declares all forms with
// LONGLLAVA_DECLARE and picks one with LONGLLAVA_PICK.
//
// Kernel files must not use the C++ library: the linker keeps ONE copy of an inline std:: function, perhaps
// the one compiled with AVX-512, and older processors would stop with an illegal instruction. Threads live in
// threads.cpp, behind a plain function pointer.
#pragma once

#include <stdint.h>

#define LONGLLAVA_ABI 8  // longllava/ops/native.py holds the same number
#define LONGLLAVA_EXPORT extern "C" __attribute__((visibility("default")))

namespace longllava {

enum class Isa { portable, avx2, avx512 };

Isa chosen_isa();          // best form the processor runs, or the one LONGLLAVA_ISA names
bool has_avx512_bf16();    // true only when the AVX-512 form is in use and the processor has AVX512_BF16
bool has_avx512_vnni();    // the same of AVX512_VNNI
bool has_amx();            // and of AMX for int8 and bf16, where the system lets this process use its tiles

}  // namespace longllava

// Where the compiler knows the instructions of *_amx_kernels.cpp.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define LONGLLAVA_HAS_AMX
#endif

#if defined(__x86_64__)
#define LONGLLAVA_DECLARE(result, name, arguments)  \
  namespace longllava {                             \
  namespace portable { result name arguments; }     \
  namespace avx2 { result name arguments; }         \
  namespace avx512 { result name arguments; }       \
  }
#define LONGLLAVA_PICK(name)                                                       \
  (::longllava::chosen_isa() == ::longllava::Isa::avx512 ? ::longllava::avx512::name \
   : ::longllava::chosen_isa() == ::longllava::Isa::avx2 ? ::longllava::avx2::name   \
                                                         : ::longllava::portable::name)
#else
#define LONGLLAVA_DECLARE(result, name, arguments) \
  namespace longllava {                            \
  namespace portable { result name arguments; }    \
  }
#define LONGLLAVA_PICK(name) (::longllava::portable::name)
#endif
