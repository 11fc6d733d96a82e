// The scan's forward kernel for bf16.
#include "selective_scan_forward_launch.cuh"

int longllava::scan_forward_bf16(const ScanArguments& p) { return scan_forward_of<bf16>(p); }
