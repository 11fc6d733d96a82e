// Which backward kernel a call gets. Included once for each element type, so that the types compile side by side.
#pragma once

#include "selective_scan_backward.cuh"
#include "selective_scan_backward_states.cuh"

namespace longllava {

inline int64_t scan_blocks(const ScanArguments& p, int channels) {
  return p.batch * p.n_spans * ((p.channels + channels - 1) / channels);
}

template <class T, int CHANNELS, bool FLAGS, bool WIDE> int scan_backward_as(const ScanArguments& p) {
  return launch(scan_backward<T, CHANNELS, FLAGS, WIDE>, scan_blocks(p, CHANNELS), CHANNELS * 4,
                sizeof(BackwardShared<CHANNELS>), p.stream, p);
}

template <class T> int scan_backward_of(const ScanArguments& p) {
  if (p.n_spans > 1) {
    int error = launch(scan_backward_states<T>, scan_blocks(p, PIECE_CHANNELS), PIECE_THREADS, 0, p.stream, p);
    if (error == 0) error = scan_join(p, p.grad_end, nullptr, true);
    if (error != 0) return error;
  }
  if (p.block == 32) return scan_backward_as<T, 32, true, false>(p);
  if (!p.wide) return scan_backward_as<T, 64, true, false>(p);
  return p.flags == nullptr ? scan_backward_as<T, 64, false, true>(p) : scan_backward_as<T, 64, true, true>(p);
}

}  // namespace longllava
