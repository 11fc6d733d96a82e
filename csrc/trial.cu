// What is asked of the CUDA library before any of its ops: its version, whether it runs here, what an error means.
#include <device.cuh>

namespace longllava {

__global__ void trial_kernel(float* x) { x[0] = 1.0f; }

}  // namespace longllava

using namespace longllava;

// longllava/ops/native_cuda.py holds the same number; raise both when the C interface changes.
LONGLLAVA_EXPORT int longllava_cuda_abi() { return 7; }

LONGLLAVA_EXPORT int longllava_cuda_trial(float* x, void* stream) { return launch(trial_kernel, 1, 1, 0, stream, x); }

LONGLLAVA_EXPORT const char* longllava_cuda_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
