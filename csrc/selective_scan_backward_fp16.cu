// The scan's backward kernels for fp16.
#include "selective_scan_backward_launch.cuh"

int longllava::scan_backward_fp16(const ScanArguments& p) { return scan_backward_of<fp16>(p); }
