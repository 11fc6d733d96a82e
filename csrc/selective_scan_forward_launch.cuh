// Which forward kernel a call gets. Included once for each element type, so that the types compile side by side.
#pragma once

#include "selective_scan_forward.cuh"

namespace longllava {

inline int64_t scan_blocks(const ScanArguments& p) {
  return p.batch * p.n_spans * ((p.channels + SCAN_CHANNELS - 1) / SCAN_CHANNELS);
}

template <class T, int TOKENS, int DEPTH, bool FAST> int scan_forward_as(const ScanArguments& p) {
  constexpr int64_t BYTES = sizeof(ForwardShared<T, TOKENS, DEPTH>);
  const auto start = [&](auto kernel) {
    if (p.early == NOT_EARLY) return launch(kernel, scan_blocks(p), SCAN_THREADS, BYTES, p.stream, p);
    return launch_early(kernel, scan_blocks(p), SCAN_THREADS, BYTES, p.stream, p);
  };
  if (p.n_spans > 1) {
    int error = start(scan_forward<T, TOKENS, DEPTH, FAST, true, false>);
    if (error == 0) error = scan_join(p, p.state, nullptr, false);
    if (error != 0) return error;
  }
  return start(scan_forward<T, TOKENS, DEPTH, FAST, false, false>);
}

template <class T> int scan_forward_of(const ScanArguments& p) {
  const bool fast = p.wide != 0 && p.flags == nullptr && p.states == SCAN_STATES;
  if (p.rows != nullptr) {
    if constexpr (sizeof(T) == 2) {
      if (fast && p.n_spans == 1)
        return launch_together(scan_forward<T, SCAN_CHUNK, 1, true, false, true>, scan_blocks(p), SCAN_THREADS,
                               INT8_BYTES<T, SCAN_CHUNK, 1>, p.stream, p);
    }
    return -1;  // the caller was to see to that
  }
  if (!fast) return scan_forward_as<T, SMALL_TOKENS, SMALL_DEPTH, false>(p);
  if constexpr (sizeof(T) == 2) {  // an A100 has no room for tiles of 32 tokens
    if (shared_memory_limit() >= int64_t(sizeof(ForwardShared<T, 32, 1>))) return scan_forward_as<T, 32, 1, true>(p);
  }
  return scan_forward_as<T, SMALL_TOKENS, SMALL_DEPTH, true>(p);
}

}  // namespace longllava
