// Whether this build has code for a device, asked of a kernel that does nothing.
#include "common/cuda/probe.h"

namespace lgk::cuda {

#if defined(LGK_SIMT)
int device_status(int) { return 0; }
std::vector<int> architectures() { return {}; }
#else
static __global__ void nothing() {}

int device_status(int device) {
  int current = 0;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaGetDevice(&current);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    status = cudaFuncGetAttributes(&attributes, nothing);
    cudaSetDevice(current);
  }
  cudaGetLastError();  // so that no later launch finds this one's
  return static_cast<int>(status);
}

std::vector<int> architectures() { return {__CUDA_ARCH_LIST__}; }
#endif

}  // namespace lgk::cuda
