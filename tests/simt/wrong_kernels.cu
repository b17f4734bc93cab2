// Kernels that try the executor itself; most of them are wrong on purpose.
#include "common/cuda/launch.h"

namespace {

// Rotates each block's values by one through shared memory. Without the barrier a thread may read its neighbour's
// place before the neighbour wrote it.
__global__ void rotate(const float* in, float* out, bool with_barrier) {
  LGK_DYNAMIC_SHARED(float, shared);
  const unsigned t = threadIdx.x, first = blockIdx.x * blockDim.x;
  shared[t] = in[first + t];
  if (with_barrier) __syncthreads();
  out[first + t] = shared[(t + 1) % blockDim.x];
}

// Sum over the block; each warp's part goes through shared memory. Without the first barrier a fast warp may write its
// part of the next sum before a slow one has read this sum's.
__device__ float block_sum(float value, float* parts, bool with_barrier) {
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(0xffffffffu, value, delta);
  if (with_barrier) __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += parts[warp];
  return sum;
}

// Row 0: the sum of the values; 1: of their squares.
__global__ void two_sums(const float* in, float* out, bool with_barrier) {
  LGK_DYNAMIC_SHARED(float, parts);
  const unsigned t = threadIdx.x;
  out[t] = block_sum(in[t], parts, with_barrier);
  out[blockDim.x + t] = block_sum(in[t] * in[t], parts, with_barrier);
}

// Writes `beyond` floats past the end of its dynamic shared memory.
__global__ void overflow(float* out, int beyond) {
  LGK_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x + beyond] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void divergent_barrier(int threads_that_wait) {
  if (static_cast<int>(threadIdx.x) < threads_that_wait) __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Row 0: value of lane 5; 1: of lane + 3; 2: of lane ^ 9; 3: ballot of odd lanes; 4: any; 5: all, over each warp.
__global__ void warp_collectives(const int* in, int* out) {
  const unsigned n = blockDim.x, t = threadIdx.x, all = 0xffffffffu;
  const int value = in[t];
  out[t] = __shfl_sync(all, value, 5);
  out[n + t] = __shfl_down_sync(all, value, 3);
  out[2 * n + t] = __shfl_xor_sync(all, value, 9);
  out[3 * n + t] = static_cast<int>(__ballot_sync(all, value % 2 != 0));
  out[4 * n + t] = __any_sync(all, value == 40);
  out[5 * n + t] = __all_sync(all, value < 32);
}

}  // namespace

void launch_rotate(const float* in, float* out, int blocks, int threads, bool with_barrier) {
  LGK_LAUNCH(rotate, blocks, threads, threads * sizeof(float), 0, in, out, with_barrier);
}
void launch_two_sums(const float* in, float* out, int threads, bool with_barrier) {
  LGK_LAUNCH(two_sums, 1, threads, threads / 32 * sizeof(float), 0, in, out, with_barrier);
}
void launch_overflow(float* out, int threads, int beyond) {
  LGK_LAUNCH(overflow, 1, threads, threads * sizeof(float), 0, out, beyond);
}
void launch_divergent_barrier(int threads, int waiting) { LGK_LAUNCH(divergent_barrier, 1, threads, 0, 0, waiting); }
void launch_two_barriers(unsigned blocks, unsigned threads, size_t shared) {
  LGK_LAUNCH(two_barriers, blocks, threads, shared, 0);
}
void launch_warp_collectives(const int* in, int* out, int threads) {
  LGK_LAUNCH(warp_collectives, 1, threads, 0, 0, in, out);
}
