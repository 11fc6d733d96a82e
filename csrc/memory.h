// Memory of one call, on a cache line and not cleared. Not for kernel files: it uses the C++ library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace longllava {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
typedef std::unique_ptr<char, Free> Memory;

inline Memory memory(int64_t bytes) {
  void* got = nullptr;
  if (posix_memalign(&got, 64, std::max<int64_t>(bytes, 64)) != 0) throw std::bad_alloc();
  return Memory(static_cast<char*>(got));
}

}  // namespace longllava
