// Batch statistics of each channel in two passes: partial moments of each split of the batch, then their merge.
#include "common/cuda/moments.h"
#include "lls/cuda/bins.h"

namespace lgk::cuda {
namespace {

LGK_DEVICE Moments warp_merge(Moments value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    value = merge(value,
                  Moments{__shfl_down_sync(kAllLanes, value.count, step), __shfl_down_sync(kAllLanes, value.mean, step),
                          __shfl_down_sync(kAllLanes, value.m2, step)});
  return value;  // in lane 0
}

// partial: (4, splits, channels)
LGK_DEVICE void write_partial(float* partial, int splits, int channels, int split, int c, float origin,
                              const Moments& value) {
  const int64_t plane = int64_t{splits} * channels, index = int64_t{split} * channels + c;
  partial[index] = value.count;
  partial[plane + index] = value.mean;
  partial[2 * plane + index] = value.m2;
  partial[3 * plane + index] = origin;
}

// Block (channel vectors, rows) on tile blockIdx.x of the channels and split blockIdx.y of the rows (b, h, w).
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    partial_moments_nhwc(int64_t rows, int64_t rows_per_split, int channels, bool aligned, const T* __restrict__ z,
                         float* partial) {
  constexpr int V = kVector<T>;
  LGK_DYNAMIC_SHARED(float, shared);  // (3, blockDim.y, V, blockDim.x)
  const int c0 = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  const int64_t begin = blockIdx.y * rows_per_split, end = min(begin + rows_per_split, rows);
  float count = 0.0f, pivot[V] = {}, sum[V] = {}, square[V] = {};
  if (c0 < channels) {
    for (int64_t first = begin + threadIdx.y; first < end; first += blockDim.y * kLoads) {
      Pack<T, V> pack[kLoads];
#pragma unroll
      for (int q = 0; q < kLoads; ++q)
        if (first + q * blockDim.y < end)
          pack[q] = load<T, V>(z + (first + q * blockDim.y) * channels + c0, channels - c0, aligned);
      if (count == 0.0f) {
#pragma unroll
        for (int v = 0; v < V; ++v) pivot[v] = to_float(pack[0].element[v]);
      }
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        if (first + q * blockDim.y >= end) continue;
        count += 1.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float deviation = to_float(pack[q].element[v]) - pivot[v];
          sum[v] += deviation;
          square[v] += deviation * deviation;
        }
      }
    }
  }
  const int tile = blockDim.x * V, plane = blockDim.y * tile;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float origin = count > 0.0f ? near_mean(z + min(c0 + v, channels - 1), channels, rows) : 0.0f;
    const Moments value = moments(count, origin, pivot[v], sum[v], square[v]);
    const int slot = (threadIdx.y * V + v) * blockDim.x + threadIdx.x;
    shared[slot] = value.count;
    shared[plane + slot] = value.mean;
    shared[2 * plane + slot] = value.m2;
  }
  __syncthreads();
  for (int slot = threadIdx.y * blockDim.x + threadIdx.x; slot < tile; slot += blockDim.x * blockDim.y) {
    const int c = (blockIdx.x * blockDim.x + slot % blockDim.x) * V + slot / blockDim.x;
    if (c >= channels) continue;
    Moments total{0.0f, 0.0f, 0.0f};
    for (int k = slot; k < plane; k += tile)
      total = merge(total, Moments{shared[k], shared[plane + k], shared[2 * plane + k]});
    write_partial(partial, gridDim.y, channels, blockIdx.y, c, near_mean(z + c, channels, rows), total);
  }
}

// Block (vectors of a plane, planes) on channel blockIdx.x and split blockIdx.y of the batch.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    partial_moments_nchw(int64_t batch, int64_t batch_per_split, int channels, int64_t plane, bool aligned,
                         const T* __restrict__ z, float* partial) {
  constexpr int V = kVector<T>;
  LGK_DYNAMIC_SHARED(float, shared);  // (3, warps)
  const int c = blockIdx.x;
  const int64_t begin = blockIdx.y * batch_per_split, end = min(begin + batch_per_split, batch);
  float count = 0.0f, pivot = 0.0f, sum = 0.0f, square = 0.0f;
  for (int64_t b = begin + threadIdx.y; b < end; b += blockDim.y) {
    const T* const values = z + (b * channels + c) * plane;
    for (int64_t first = int64_t{threadIdx.x} * V; first < plane; first += int64_t{blockDim.x} * V * kLoads) {
      Pack<T, V> pack[kLoads];
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int64_t k = first + int64_t{q} * blockDim.x * V;
        if (k < plane) pack[q] = load<T, V>(values + k, static_cast<int>(min(plane - k, int64_t{V})), aligned);
      }
      if (count == 0.0f) pivot = to_float(pack[0].element[0]);
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int64_t k = first + int64_t{q} * blockDim.x * V;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (k + v >= plane) continue;
          const float deviation = to_float(pack[q].element[v]) - pivot;
          count += 1.0f;
          sum += deviation;
          square += deviation * deviation;
        }
      }
    }
  }
  const float origin = batch == 0 ? 0.0f : near_mean(z + c * plane, 1, plane);
  const Moments own = warp_merge(moments(count, origin, pivot, sum, square));
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  if (thread % 32 == 0) {
    shared[thread / 32] = own.count;
    shared[warps + thread / 32] = own.mean;
    shared[2 * warps + thread / 32] = own.m2;
  }
  __syncthreads();
  if (thread != 0) return;
  Moments total{0.0f, 0.0f, 0.0f};
  for (int k = 0; k < warps; ++k) total = merge(total, Moments{shared[k], shared[warps + k], shared[2 * warps + k]});
  write_partial(partial, gridDim.y, channels, blockIdx.y, c, origin, total);
}

// torch's lerp
LGK_DEVICE float interpolate(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

// One warp a channel: merges the splits, writes mean and rstd, moves the running statistics.
__global__ void __launch_bounds__(kThreads, 2)
    finish_moments(int splits, int channels, const float* __restrict__ partial, const float* __restrict__ bias,
                   float* running_mean, float* running_var, float momentum, float eps, float* mean, float* rstd) {
  const int c = blockIdx.x * blockDim.y + threadIdx.y;
  if (c >= channels) return;  // the whole warp
  const int64_t plane = int64_t{splits} * channels;
  Moments total{0.0f, 0.0f, 0.0f};
  for (int split = threadIdx.x; split < splits; split += 32) {
    const int64_t k = int64_t{split} * channels + c;
    total = merge(total, Moments{partial[k], partial[plane + k], partial[2 * plane + k]});
  }
  total = warp_merge(total);
  if (threadIdx.x != 0) return;
  const float count = total.count, average = count == 0.0f ? NAN : partial[3 * plane + c] + total.mean;
  const float variance = total.m2 / count;
  mean[c] = average;
  rstd[c] = 1.0f / sqrtf(variance + eps);
  if (running_mean == nullptr) return;
  const float shifted = bias == nullptr ? average : average + bias[c];
  running_mean[c] = interpolate(running_mean[c], shifted, momentum);
  running_var[c] = interpolate(running_var[c], variance * (count / fmaxf(count - 1.0f, 1.0f)), momentum);
}

// Enough splits that the grid fills a large GPU, each with enough elements to be worth a block.
constexpr int kBlocks = 1024;
constexpr int64_t kElementsPerThread = 32;

}  // namespace

int lls_batch_stats_splits(const Image& s) {
  const int64_t per_channel = s.batch * s.height * s.width;
  const int64_t blocks = ceil_div<int64_t>(per_channel * s.channels, kThreads * kElementsPerThread);
  const int64_t tiles = s.channels_last ? ceil_div(s.channels, 256) : s.channels;
  const int64_t splits = std::min<int64_t>(std::min<int64_t>(blocks, kBlocks) / std::max<int64_t>(tiles, 1),
                                           s.channels_last ? per_channel : s.batch);
  return static_cast<int>(std::max<int64_t>(splits, 1));
}

int lls_batch_stats(const Image& s, const void* z, const BatchStatistics& statistics, float* scratch, void* stream) {
  if (s.channels == 0) return 0;
  const int splits = lls_batch_stats_splits(s);
  const int64_t plane = int64_t{s.height} * s.width;
  const int status = with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = kVector<T>;
    const T* const values = static_cast<const T*>(z);
    if (s.channels_last) {
      const int x = power_of_two_from(ceil_div(s.channels, V), 32), y = kThreads / x;
      const int64_t rows = s.batch * plane;
      LGK_LAUNCH((partial_moments_nhwc<T>), dim3(ceil_div(s.channels, x * V), splits), dim3(x, y),
                 3 * kThreads * V * sizeof(float), stream, rows, ceil_div<int64_t>(rows, splits), s.channels,
                 is_aligned(z, 16) && s.channels % V == 0, values, scratch);
    } else {
      const int x = power_of_two_from(ceil_div<int64_t>(plane, V), kThreads), y = kThreads / x;
      LGK_LAUNCH((partial_moments_nchw<T>), dim3(s.channels, splits), dim3(x, y), 3 * kThreads / 32 * sizeof(float),
                 stream, s.batch, ceil_div<int64_t>(s.batch, splits), s.channels, plane,
                 is_aligned(z, 16) && plane % V == 0, values, scratch);
    }
    return launch_status();
  });
  if (status != 0) return status;
  const int warps = kThreads / 32;
  LGK_LAUNCH(finish_moments, dim3(ceil_div(s.channels, warps)), dim3(32, warps), 0, stream, splits, s.channels, scratch,
             statistics.bias, statistics.running_mean, statistics.running_var, statistics.momentum, statistics.eps,
             statistics.mean, statistics.rstd);
  return launch_status();
}

}  // namespace lgk::cuda
