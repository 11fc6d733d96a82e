// The scan's backward kernels for bf16.
#include "selective_scan_backward_launch.cuh"

int longllava::scan_backward_bf16(const ScanArguments& p) { return scan_backward_of<bf16>(p); }
