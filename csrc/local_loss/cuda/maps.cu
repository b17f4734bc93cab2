// Passes over feature maps: means, standard deviations and sums of squares of planes, and the gradients that come back.
//
// A group of threads reads a contiguous plane in 16-byte vectors; with the channels last, a block reads tiles of
// (positions, channel vectors). Threads' partial results are merged in a fixed order.
#include "common/cuda/moments.h"
#include "local_loss/cuda/kernels.h"

namespace lgk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;      // 16-byte loads of a thread in flight
constexpr int kTileLanes = 8;  // side by side along the channels: 128 bytes

// -- statistics: Value merges over threads, Running is one thread's -----------------------------------------------

LGK_DEVICE float merge(float a, float b) { return a + b; }
LGK_DEVICE float from_lane(float value, int step) { return __shfl_xor_sync(kAllLanes, value, step); }
LGK_DEVICE Moments from_lane(const Moments& value, int step) {
  return Moments{from_lane(value.count, step), from_lane(value.mean, step), from_lane(value.m2, step)};
}

// out (splits, planes): sums of values or of their squares, over `count`.
template <bool kSquare>
struct Sum {
  using Value = float;
  float* out;
  int64_t planes;
  float count;

  struct Running {
    float sum = 0.0f;
    LGK_DEVICE void start(float) {}
    LGK_DEVICE void add(float value) { sum += kSquare ? value * value : value; }
    LGK_DEVICE float value(float, float) const { return sum; }
  };
  template <typename T>
  LGK_DEVICE float origin(const T*, int64_t, int64_t) const {
    return 0.0f;
  }
  LGK_DEVICE void write(int64_t plane, int split, float, float total) const {
    out[split * planes + plane] = total / count;
  }
};

struct Deviation {
  using Value = Moments;
  float *mean, *deviation;

  struct Running {
    float pivot = 0.0f, sum = 0.0f, square = 0.0f;
    LGK_DEVICE void start(float first) { pivot = first; }
    LGK_DEVICE void add(float value) {
      const float distance = value - pivot;
      sum += distance;
      square += distance * distance;
    }
    LGK_DEVICE Moments value(float count, float origin) const { return moments(count, origin, pivot, sum, square); }
  };
  template <typename T>
  LGK_DEVICE float origin(const T* plane, int64_t stride, int64_t positions) const {
    return near_mean(plane, stride, positions);
  }
  LGK_DEVICE void write(int64_t plane, int, float origin, const Moments& total) const {
    mean[plane] = origin + total.mean;
    deviation[plane] = sqrtf(total.m2 / (total.count - 1.0f));
  }
};

// -- reductions ---------------------------------------------------------------------------------------------------

// Block (group of a plane, planes) on split blockIdx.y of the positions.
template <typename T, typename Statistic>
__global__ void __launch_bounds__(kThreads, 2) reduce_planes(Statistic statistic, int64_t planes, int64_t positions,
                                                             int64_t per_split, bool aligned, const T* __restrict__ x) {
  constexpr int V = kVector<T>;
  using Value = typename Statistic::Value;
  LGK_DYNAMIC_SHARED(float, shared);
  Value* const parts = reinterpret_cast<Value*>(shared);  // (warps) where a group is wider than a warp
  const int64_t plane = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t begin = blockIdx.y * per_split, end = min(begin + per_split, positions);
  const int group = blockDim.x;
  typename Statistic::Running running;
  float count = 0.0f, origin = 0.0f;
  if (plane < planes) {
    const T* const values = x + plane * positions;
    for (int64_t first = begin + threadIdx.x * V; first < end; first += group * V * kLoads) {
      Pack<T, V> pack[kLoads];
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int64_t k = first + q * group * V;
        if (k < end) pack[q] = load<T, V>(values + k, static_cast<int>(min(end - k, int64_t{V})), aligned);
      }
      if (count == 0.0f) running.start(to_float(pack[0].element[0]));
#pragma unroll
      for (int q = 0; q < kLoads; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (first + q * group * V + v >= end) continue;
          count += 1.0f;
          running.add(to_float(pack[q].element[v]));
        }
    }
    origin = statistic.origin(values, 1, positions);
  }
  Value total = running.value(count, origin);
  for (int step = 1; step < min(group, 32); step *= 2) total = merge(total, from_lane(total, step));
  if (group > 32) {
    const int warps = group / 32, thread = threadIdx.y * group + threadIdx.x;
    if (thread % 32 == 0) parts[thread / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int warp = 1; warp < warps; ++warp) total = merge(total, parts[threadIdx.y * warps + warp]);
  }
  if (threadIdx.x == 0 && plane < planes) statistic.write(plane, blockIdx.y, origin, total);
}

// Block (channel vectors, positions) on a tile of a sample's channels.
template <typename T, typename Statistic>
__global__ void __launch_bounds__(kThreads, 2) reduce_channels(Statistic statistic, int64_t positions, int channels,
                                                               int tiles, bool aligned, const T* __restrict__ x) {
  constexpr int V = kVector<T>;
  using Value = typename Statistic::Value;
  LGK_DYNAMIC_SHARED(float, shared);
  Value* const parts = reinterpret_cast<Value*>(shared);  // (blockDim.y, V, blockDim.x)
  const int64_t sample = blockIdx.x / tiles;
  const int tile = blockDim.x * V, first_channel = blockIdx.x % tiles * tile;
  const int c = first_channel + threadIdx.x * V;
  const T* const values = x + sample * positions * channels;
  typename Statistic::Running running[V];
  float count = 0.0f;
  if (c < channels) {
    for (int64_t first = threadIdx.y; first < positions; first += blockDim.y * kLoads) {
      Pack<T, V> pack[kLoads];
#pragma unroll
      for (int q = 0; q < kLoads; ++q)
        if (first + q * blockDim.y < positions)
          pack[q] = load<T, V>(values + (first + q * blockDim.y) * channels + c, channels - c, aligned);
      if (count == 0.0f) {
#pragma unroll
        for (int v = 0; v < V; ++v) running[v].start(to_float(pack[0].element[v]));
      }
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        if (first + q * blockDim.y >= positions) continue;
        count += 1.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) running[v].add(to_float(pack[q].element[v]));
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float origin = statistic.origin(values + min(c + v, channels - 1), channels, positions);
    parts[(threadIdx.y * V + v) * blockDim.x + threadIdx.x] = running[v].value(count, origin);
  }
  __syncthreads();
  for (int slot = threadIdx.y * blockDim.x + threadIdx.x; slot < tile; slot += kThreads) {
    const int channel = first_channel + slot % blockDim.x * V + slot / blockDim.x;
    if (channel >= channels) continue;
    Value total = parts[slot];
    for (int y = 1; y < static_cast<int>(blockDim.y); ++y) total = merge(total, parts[y * tile + slot]);
    statistic.write(sample * channels + channel, 0, statistic.origin(values + channel, channels, positions), total);
  }
}

// -- gradients ----------------------------------------------------------------------------------------------------

// Block (group of a plane, planes) on split blockIdx.y of the positions.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    scale_planes(int64_t planes, int64_t positions, int64_t per_split, bool aligned, const T* __restrict__ x,
                 const float* __restrict__ mean, const float* __restrict__ factor, const float* __restrict__ scale,
                 T* __restrict__ out) {
  constexpr int V = kVector<T>;
  const int64_t plane = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (plane >= planes) return;
  const int64_t begin = blockIdx.y * per_split, end = min(begin + per_split, positions);
  const float origin = mean == nullptr ? 0.0f : mean[plane], slope = factor[plane] * *scale;
  for (int64_t first = begin + threadIdx.x * V; first < end; first += blockDim.x * V * kLoads) {
    Pack<T, V> pack[kLoads];
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int64_t k = first + q * blockDim.x * V;
      if (k < end) pack[q] = load<T, V>(x + plane * positions + k, static_cast<int>(min(end - k, int64_t{V})), aligned);
    }
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int64_t k = first + q * blockDim.x * V;
      if (k >= end) continue;
      float value[V];
#pragma unroll
      for (int v = 0; v < V; ++v) value[v] = (to_float(pack[q].element[v]) - origin) * slope;
      store<T, V>(out + plane * positions + k, value, static_cast<int>(min(end - k, int64_t{V})), aligned);
    }
  }
}

// Block (channel vectors, positions) on a tile of a sample's channels.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    scale_channels(int64_t positions, int channels, int tiles, bool aligned, const T* __restrict__ x,
                   const float* __restrict__ mean, const float* __restrict__ factor, const float* __restrict__ scale,
                   T* __restrict__ out) {
  constexpr int V = kVector<T>;
  const int64_t sample = blockIdx.x / tiles, base = sample * positions * channels;
  const int c = (blockIdx.x % tiles * blockDim.x + threadIdx.x) * V;
  if (c >= channels) return;
  float origin[V], slope[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int64_t plane = sample * channels + min(c + v, channels - 1);
    origin[v] = mean == nullptr ? 0.0f : mean[plane];
    slope[v] = factor[plane] * *scale;
  }
  for (int64_t first = threadIdx.y; first < positions; first += blockDim.y * kLoads) {
    Pack<T, V> pack[kLoads];
#pragma unroll
    for (int q = 0; q < kLoads; ++q)
      if (first + q * blockDim.y < positions)
        pack[q] = load<T, V>(x + base + (first + q * blockDim.y) * channels + c, channels - c, aligned);
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      if (first + q * blockDim.y >= positions) continue;
      float value[V];
#pragma unroll
      for (int v = 0; v < V; ++v) value[v] = (to_float(pack[q].element[v]) - origin[v]) * slope[v];
      store<T, V>(out + base + (first + q * blockDim.y) * channels + c, value, channels - c, aligned);
    }
  }
}

// -- launches -----------------------------------------------------------------------------------------------------

// Of contiguous planes: `group` threads a plane, `rows` planes a block, each plane cut into `splits` parts.
struct Layout {
  int group, rows;
  int64_t splits, per_split;
};

constexpr int64_t kBlocks = 2048;  // fill a large GPU a few times
constexpr int64_t kTiles = 256;
constexpr int64_t kSplit = int64_t{kThreads} * kLoads * 8;  // smallest part, in elements: whole vectors of each dtype

Layout layout(const Planes& s, int vector, bool may_split) {
  const int64_t vectors = ceil_div<int64_t>(s.positions, vector);
  // One plane a warp at most where there are planes enough, so that no block waits for its slowest warp.
  const int group = power_of_two_from(ceil_div<int64_t>(vectors, kLoads), s.planes >= 4096 ? 32 : kThreads);
  Layout result{group, kThreads / group, 1, s.positions};
  if (!may_split || group < kThreads) return result;
  const int64_t wanted = std::min(s.positions / kSplit, ceil_div(kBlocks, s.planes));
  result.per_split = ceil_div(ceil_div(s.positions, std::max<int64_t>(wanted, 1)), kSplit) * kSplit;
  result.splits = ceil_div(s.positions, result.per_split);
  return result;
}

template <typename T, typename Statistic>
int reduce_contiguous(const Planes& s, const Statistic& statistic, const void* x, bool may_split, void* stream) {
  constexpr int V = kVector<T>;
  const Layout l = layout(s, V, may_split);
  LGK_LAUNCH((reduce_planes<T, Statistic>), dim3(ceil_div<int64_t>(s.planes, l.rows), l.splits), dim3(l.group, l.rows),
             kThreads / 32 * sizeof(typename Statistic::Value), stream, statistic, s.planes, s.positions, l.per_split,
             is_aligned(x, 16) && s.positions % V == 0, static_cast<const T*>(x));
  return launch_status();
}

// Of a tensor with the channels last: `lanes` vectors of channels by positions, `count` tiles a sample.
struct Tiles {
  int lanes, count;
};

Tiles tiles(const Planes& s, int vector) {
  const int64_t samples = s.planes / s.channels;
  Tiles t{power_of_two_from(ceil_div(s.channels, vector), kTileLanes), 0};
  // Narrower tiles, down to a sector of memory, where there are too few for a large GPU.
  while (t.lanes > 2 && samples * ceil_div(s.channels, t.lanes * vector) < kTiles) t.lanes /= 2;
  t.count = ceil_div(s.channels, t.lanes * vector);
  return t;
}

template <typename T, typename Statistic>
int reduce(const Planes& s, const Statistic& statistic, const void* x, void* stream) {
  if (s.channels == 1) return reduce_contiguous<T>(s, statistic, x, false, stream);
  constexpr int V = kVector<T>;
  const Tiles t = tiles(s, V);
  LGK_LAUNCH((reduce_channels<T, Statistic>), dim3(s.planes / s.channels * t.count), dim3(t.lanes, kThreads / t.lanes),
             kThreads * V * sizeof(typename Statistic::Value), stream, statistic, s.positions, s.channels, t.count,
             is_aligned(x, 16) && s.channels % V == 0, static_cast<const T*>(x));
  return launch_status();
}

// One block: sums the splits of each row, then loss and kappa.
__global__ void __launch_bounds__(kThreads, 2)
    goodness_loss(int64_t batch, int splits, float threshold, float factor, const float* __restrict__ partial,
                  const uint8_t* __restrict__ is_positive, float* squares, float* kappa, float* loss) {
  LGK_DYNAMIC_SHARED(float, shared);  // (warps)
  float sum = 0.0f;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    float square = 0.0f;
    for (int split = 0; split < splits; ++split) square += partial[split * batch + b];
    squares[b] = square;
    const float sign = is_positive[b] ? 1.0f : -1.0f;
    const float margin = sign * (threshold - factor * square);
    sum += fmaxf(margin, 0.0f) + log1pf(expf(-fabsf(margin)));
    if (kappa != nullptr) kappa[b] = sign * (-2.0f * factor / static_cast<float>(batch)) / (1.0f + expf(-margin));
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += shared[warp];
  *loss = sum / static_cast<float>(batch);
}

}  // namespace

int local_loss_moments(const Planes& s, const void* x, float* mean, float* deviation, void* stream) {
  if (s.planes == 0) return 0;
  return with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    return deviation == nullptr ? reduce<T>(s, Sum<false>{mean, s.planes, static_cast<float>(s.positions)}, x, stream)
                                : reduce<T>(s, Deviation{mean, deviation}, x, stream);
  });
}

int local_loss_goodness_splits(const Planes& s) {
  return static_cast<int>(layout(s, s.dtype == kFloat32 ? 4 : 8, true).splits);
}

int local_loss_goodness(const Planes& s, const void* x, const uint8_t* is_positive, float threshold, float factor,
                        float* partial, float* squares, float* kappa, float* loss, void* stream) {
  if (s.planes == 0 || s.channels != 1) return kInvalidArgument;
  const int status = with_dtype(s.dtype, [&](auto element) {
    return reduce_contiguous<decltype(element)>(s, Sum<true>{partial, s.planes, 1.0f}, x, true, stream);
  });
  if (status != 0) return status;
  LGK_LAUNCH(goodness_loss, dim3(1), dim3(kThreads), kThreads / 32 * sizeof(float), stream, s.planes,
             local_loss_goodness_splits(s), threshold, factor, partial, is_positive, squares, kappa, loss);
  return launch_status();
}

int local_loss_scale(const Planes& s, const void* x, const float* mean, const float* factor, const float* scale,
                     void* out, void* stream) {
  if (s.planes == 0 || s.positions == 0) return 0;
  return with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = kVector<T>;
    const T* const values = static_cast<const T*>(x);
    T* const result = static_cast<T*>(out);
    const bool aligned = is_aligned(x, 16) && is_aligned(out, 16);
    if (s.channels == 1) {
      const Layout l = layout(s, V, true);
      LGK_LAUNCH(scale_planes<T>, dim3(ceil_div<int64_t>(s.planes, l.rows), l.splits), dim3(l.group, l.rows), 0, stream,
                 s.planes, s.positions, l.per_split, aligned && s.positions % V == 0, values, mean, factor, scale,
                 result);
    } else {
      const Tiles t = tiles(s, V);
      LGK_LAUNCH(scale_channels<T>, dim3(s.planes / s.channels * t.count), dim3(t.lanes, kThreads / t.lanes), 0, stream,
                 s.positions, s.channels, t.count, aligned && s.channels % V == 0, values, mean, factor, scale, result);
    }
    return launch_status();
  });
}

}  // namespace lgk::cuda
