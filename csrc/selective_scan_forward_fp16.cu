// The scan's forward kernel for fp16.
#include "selective_scan_forward_launch.cuh"

int longllava::scan_forward_fp16(const ScanArguments& p) { return scan_forward_of<fp16>(p); }
