// The scan's backward kernels for fp32.
#include "selective_scan_backward_launch.cuh"

int longllava::scan_backward_fp32(const ScanArguments& p) { return scan_backward_of<float>(p); }
