// Sums over a row that one block owns, in a fixed order: lanes, then warps.
#pragma once
#include "common/cuda/device.h"

namespace lgk::cuda {

constexpr int kRowThreads = 256;  // at most
constexpr int kRowWarps = kRowThreads / 32;
constexpr size_t kRowShared = 3 * kRowWarps * sizeof(float);  // bytes

inline int row_threads(int64_t length) {
  return std::max(power_of_two_from(ceil_div<int64_t>(length, 4), kRowThreads), 32);
}

struct Sums {
  float a, b, c;
};

// The block's sums, in every thread. `shared`: 3 * kRowWarps floats.
LGK_DEVICE Sums block_sums(Sums value, float* shared) {
  value = Sums{warp_sum(value.a), warp_sum(value.b), warp_sum(value.c)};
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (warps == 1) return value;
  __syncthreads();  // what the last call left has been read
  if (threadIdx.x % 32 == 0) {
    shared[warp] = value.a;
    shared[kRowWarps + warp] = value.b;
    shared[2 * kRowWarps + warp] = value.c;
  }
  __syncthreads();
  Sums total{0.0f, 0.0f, 0.0f};
  for (int w = 0; w < warps; ++w) {
    total.a += shared[w];
    total.b += shared[kRowWarps + w];
    total.c += shared[2 * kRowWarps + w];
  }
  return total;
}

LGK_DEVICE float block_max(float value, float* shared) {
  value = warp_max(value);
  const int warps = blockDim.x / 32;
  if (warps == 1) return value;
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < warps; ++w) value = fmaxf(value, shared[w]);
  return value;
}

}  // namespace lgk::cuda
