// What the files with extern "C" entries share. Not for kernel files: it uses the C++ library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace longllava {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// TokenFlag of each token of (batch, length); empty if seq_idx is null. A change of value between two real tokens
// resets; padding between them does not.
inline std::vector<uint8_t> token_flags(const int32_t* seq_idx, int64_t batch, int64_t length) {
  if (seq_idx == nullptr) return {};
  std::vector<uint8_t> flags(batch * length);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t last = -1;
    for (int64_t t = b * length; t < (b + 1) * length; ++t) {
      const int32_t now = seq_idx[t];
      flags[t] = now < 0 ? TOKEN_PADDING : last >= 0 && now != last ? TOKEN_RESET : TOKEN_PLAIN;
      if (now >= 0) last = now;
    }
  }
  return flags;
}

// One thread per 100 us of work: less does not pay for starting it.
inline int useful_threads(int64_t threads, double nanoseconds) {
  return static_cast<int>(std::clamp(nanoseconds / 1e5, 1.0, std::max(1.0, double(threads))));
}

// Channels per task: as wide as leaves every thread one; a multiple of 16.
inline int64_t tile_channels(int64_t batch, int64_t channels, int threads, int64_t least, int64_t most) {
  return std::clamp<int64_t>(batch * channels / threads / 16 * 16, least, most);
}

// out (n) = the sum of partial (batch, n) over its rows, in order
inline void sum_over_batch(const std::vector<float>& partial, int64_t batch, int64_t n, float* out) {
  if (out == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0;
    for (int64_t b = 0; b < batch; ++b) sum += partial[b * n + i];
    out[i] = sum;
  }
}

// Runs an entry's body and turns running out of memory into the code that ops/native.py knows.
template <class Arguments, class Body>
int guarded(const Arguments* args, Body body) {
  if (args->bytes != sizeof(Arguments)) return 2;  // the caller was written for another version
  try {
    body(*args);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace longllava
