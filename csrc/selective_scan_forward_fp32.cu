// The scan's forward kernel for fp32.
#include "selective_scan_forward_launch.cuh"

int longllava::scan_forward_fp32(const ScanArguments& p) { return scan_forward_of<float>(p); }
