// One set of kernel sources for two compilers: nvcc, and a C++17 compiler with the CPU executor of tests/simt.
//
//   LGK_LAUNCH((kernel<T>), grid, block, shared_bytes, stream, arguments...)   starts a kernel
//   LGK_DYNAMIC_SHARED(float, name)                                            declares the dynamic shared memory
//   LGK_GRID_CONSTANT                                                          of a large argument, read where it lies
//   lgk::cuda::launch_status()                                                       0, or the error code of the launch
#pragma once
#include <cstdint>

#if defined(LGK_SIMT)
#include "simt.h"  // tests/simt: defines everything below for the CPU
#else
#include <cuda_runtime.h>

#define LGK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define LGK_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#define LGK_GRID_CONSTANT __grid_constant__

namespace lgk::cuda {
inline int launch_status() { return static_cast<int>(cudaGetLastError()); }
inline const char* status_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
inline int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
inline int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
}  // namespace lgk::cuda
#endif

#define LGK_DEVICE __device__ __forceinline__
