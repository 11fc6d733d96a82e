// Numbers below 2^-126 count as 0 while one of these lives, in its thread. Decaying states and their gradients come to
// such numbers and stay there, and each operation on one takes the processor some hundred cycles.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace longllava {
namespace {

// The processor's word on rounding and the like, and its bits that make such results and operands 0.
#if defined(__x86_64__)
typedef uint32_t Mode;
constexpr Mode FLUSHING = 0x8040;
inline Mode mode() { return _mm_getcsr(); }
inline void set_mode(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t Mode;
constexpr Mode FLUSHING = 1 << 24;
inline Mode mode() {
  Mode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_mode(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else  // right as well, and slow where such numbers come up
typedef uint32_t Mode;
constexpr Mode FLUSHING = 0;
inline Mode mode() { return 0; }
inline void set_mode(Mode) {}
#endif

class WithoutDenormals {
 public:
  WithoutDenormals() : before_(mode()) { set_mode(before_ | FLUSHING); }
  ~WithoutDenormals() { set_mode(before_); }
  WithoutDenormals(const WithoutDenormals&) = delete;
  WithoutDenormals& operator=(const WithoutDenormals&) = delete;

 private:
  Mode before_;
};

}  // namespace
}  // namespace longllava
