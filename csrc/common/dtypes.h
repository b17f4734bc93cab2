// Element types of the kernels' tensors, as passed from Python, and the mark of functions that both processors run.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define LGK_HD __host__ __device__ __forceinline__
#else
#define LGK_HD inline
#endif

namespace lgk {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace lgk
