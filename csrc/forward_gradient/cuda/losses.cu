// The replicated losses' streams over (samples, patches, groups, channels): pooling, tangents, cotangents.
//
// Some lanes of a warp share a row, the channels of one group, four channels each at a time. A row is walked over as
// often as there are sums that depend on each other; what is read again lies in the cache.
#include "forward_gradient/cuda/four.h"

namespace lgk::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kPoolRows = 8;       // warps of a block that pools
constexpr float kLossEps = 1e-5f;  // reference.py, EPS

// -- pooling --------------------------------------------------------------------------------------------------------

// Block (32, kPoolRows) on `32 / lanes` groups of a sample: a warp takes every kPoolRows-th patch. Without a norm a
// group is any 128 channels, the last one of what is left of `width`.
__global__ void __launch_bounds__(kBlockThreads)
    pool_groups(Features s, int width, int lanes, int tiles, bool layer_norm, Fours x, Fours out) {
  LGK_DYNAMIC_SHARED(float, shared);  // (kPoolRows, 32, 4)
  const int64_t sample = blockIdx.x / tiles;
  const int group = static_cast<int>(blockIdx.x % tiles) * (32 / lanes) + threadIdx.x / lanes;
  const int channel = threadIdx.x % lanes * 4;
  const int64_t column = int64_t{group} * s.channels + channel;
  const int count = group < s.groups ? min(s.channels - channel, static_cast<int>(width - column)) : 0;
  Four total = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int p = threadIdx.y; p < s.patches; p += kPoolRows) {
    Four value;
    read_four(x, (sample * s.patches + p) * width + column, count, value);
    float r = 1.0f;
    if (layer_norm) {
      const float size = static_cast<float>(s.channels);
      const float mean = lanes_sum(value[0] + value[1] + value[2] + value[3], lanes) / size;
      float square = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] = i < count ? value[i] - mean : 0.0f;
        square += value[i] * value[i];
      }
      r = 1.0f / sqrtf(lanes_sum(square, lanes) / size + kLossEps);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += value[i] * r;
  }
  const int slot = threadIdx.x * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) shared[threadIdx.y * 128 + slot + i] = total[i];
  __syncthreads();
  if (threadIdx.y != 0 || count <= 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int y = 1; y < kPoolRows; ++y) total[i] += shared[y * 128 + slot + i];
    total[i] /= static_cast<float>(s.patches);
  }
  write_four(out, sample * width + column, count, total);
}

// -- tangents and cotangents ----------------------------------------------------------------------------------------

// Where a thread works: rows of one sample, `blocks` blocks each. What is beyond the last row repeats it and writes
// nothing: all lanes take part in the sums.
struct Place {
  int64_t sample, row, lesson;  // row of all samples; first element of its group's teaching signal
  bool exists;
};

LGK_DEVICE Place place(const Features& s, int blocks) {
  const int rows = s.patches * s.groups;
  const int own = static_cast<int>(blockIdx.x % blocks) * blockDim.y + threadIdx.y, row = min(own, rows - 1);
  const int64_t sample = blockIdx.x / blocks;
  return Place{sample, sample * rows + row, (sample * s.groups + row % s.groups) * s.channels, own < rows};
}

// The mean of the row's elements from `first` on.
LGK_DEVICE float row_mean(const Fours& x, int64_t first, int channels) {
  const int lanes = blockDim.x;
  float sum = 0.0f;
  for (int c = 4 * threadIdx.x; c < channels; c += 4 * lanes) {
    Four value;
    read_four(x, first + c, channels - c, value);
    sum += value[0] + value[1] + value[2] + value[3];
  }
  return lanes_sum(sum, lanes) / static_cast<float>(channels);
}

// <LN'(x; v), t> = r (<w, t> - mean(zh w) <zh, t>), w = v - mean v
__global__ void __launch_bounds__(kBlockThreads)
    tangent_rows(Features s, int blocks, Fours x, Fours x_tangent, Fours teach, const float* __restrict__ head,
                 float* __restrict__ out) {
  const Place here = place(s, blocks);
  const int lanes = blockDim.x;
  const int64_t first = here.row * s.channels;
  const bool normed = x.data != nullptr;
  const float mean = normed ? row_mean(x, first, s.channels) : 0.0f;
  const float mean_v = normed ? row_mean(x_tangent, first, s.channels) : 0.0f;
  float square = 0.0f, along = 0.0f, taught = 0.0f, share = 0.0f;
  for (int c = 4 * threadIdx.x; c < s.channels; c += 4 * lanes) {
    const int count = s.channels - c;
    Four v, t, z;
    read_four(x_tangent, first + c, count, v);
    read_four(teach, here.lesson + c, count, t);
    if (normed) read_four(x, first + c, count, z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= count) continue;
      const float w = v[i] - mean_v;
      taught += w * t[i];
      if (!normed) continue;
      const float centred = z[i] - mean;
      square += centred * centred;
      along += centred * w;
      share += centred * t[i];
    }
  }
  float result = lanes_sum(taught, lanes);
  if (normed) {
    const float size = static_cast<float>(s.channels);
    const float r = 1.0f / sqrtf(lanes_sum(square, lanes) / size + kLossEps);
    along = lanes_sum(along, lanes) / size * (r * r);
    result = (result - along * lanes_sum(share, lanes)) * r;
  }
  if (threadIdx.x == 0 && here.exists)
    out[here.row] = result / static_cast<float>(s.patches) + (head == nullptr ? 0.0f : head[here.sample]);
}

__global__ void __launch_bounds__(kBlockThreads)
    cotangent_rows(Features s, int blocks, Fours x, const float* __restrict__ grad, Fours teach, Fours out) {
  const Place here = place(s, blocks);
  const int lanes = blockDim.x;
  const int64_t first = here.row * s.channels;
  const bool normed = x.data != nullptr;
  const float weight = grad[here.row] / static_cast<float>(s.patches);
  float mean = 0.0f, mean_t = 0.0f, r = 1.0f, along = 0.0f;
  if (normed) {
    mean = row_mean(x, first, s.channels);
    mean_t = row_mean(teach, here.lesson, s.channels);
    float square = 0.0f;
    for (int c = 4 * threadIdx.x; c < s.channels; c += 4 * lanes) {
      Four z, t;
      read_four(x, first + c, s.channels - c, z);
      read_four(teach, here.lesson + c, s.channels - c, t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i >= s.channels) continue;
        const float centred = z[i] - mean;
        square += centred * centred;
        along += centred * (t[i] - mean_t);
      }
    }
    const float size = static_cast<float>(s.channels);
    r = 1.0f / sqrtf(lanes_sum(square, lanes) / size + kLossEps);
    along = lanes_sum(along, lanes) / size * (r * r);
  }
  if (!here.exists) return;
  for (int c = 4 * threadIdx.x; c < s.channels; c += 4 * lanes) {
    Four z = {0.0f, 0.0f, 0.0f, 0.0f}, t;
    if (normed) read_four(x, first + c, s.channels - c, z);
    read_four(teach, here.lesson + c, s.channels - c, t);
#pragma unroll
    for (int i = 0; i < 4; ++i) t[i] = (t[i] - mean_t - (z[i] - mean) * along) * r * weight;
    write_four(out, first + c, s.channels - c, t);
  }
}

// -- launches -------------------------------------------------------------------------------------------------------

struct Grid {
  RowBlock block;
  int blocks;  // of a sample; 0: too many
};

Grid rows_of(const Features& s) {
  const int64_t rows = int64_t{s.patches} * s.groups;
  const RowBlock block = row_block(rows, s.channels, kBlockThreads);
  const int64_t blocks = ceil_div<int64_t>(rows, block.rows);
  return Grid{block, rows < INT32_MAX && s.samples * blocks < INT32_MAX ? static_cast<int>(blocks) : 0};
}

}  // namespace

int forward_gradient_pooled(const Features& s, const Array& x, bool layer_norm, float* out, void* stream) {
  const int width = s.groups * s.channels;
  Features shape = s;
  if (!layer_norm) {
    shape.channels = 128;
    shape.groups = ceil_div(width, 128);
  }
  const int contiguous = layer_norm ? s.channels : width;
  if (shape.channels > 128) return kInvalidArgument;
  const int lanes = power_of_two_from(ceil_div(shape.channels, 4), 32), tiles = ceil_div(shape.groups, 32 / lanes);
  if (s.samples * tiles >= INT32_MAX) return kInvalidArgument;
  LGK_LAUNCH(pool_groups, dim3(s.samples * tiles), dim3(32, kPoolRows), kPoolRows * 128 * sizeof(float), stream, shape,
             width, lanes, tiles, layer_norm, fours(x, contiguous), fours(Array{out, kFloat32}, contiguous));
  return launch_status();
}

int forward_gradient_tangent(const Features& s, const Array& x, const Array& x_tangent, const float* teach,
                             const float* head, float* out, void* stream) {
  const Grid grid = rows_of(s);
  if (grid.blocks == 0) return kInvalidArgument;
  LGK_LAUNCH(tangent_rows, dim3(s.samples * grid.blocks), dim3(grid.block.lanes, grid.block.rows), 0, stream, s,
             grid.blocks, fours(x, s.channels), fours(x_tangent, s.channels), fours(Array{teach, kFloat32}, s.channels),
             head, out);
  return launch_status();
}

int forward_gradient_cotangent(const Features& s, const Array& x, const float* grad, const float* teach,
                               const Array& out, void* stream) {
  const Grid grid = rows_of(s);
  if (grid.blocks == 0) return kInvalidArgument;
  LGK_LAUNCH(cotangent_rows, dim3(s.samples * grid.blocks), dim3(grid.block.lanes, grid.block.rows), 0, stream, s,
             grid.blocks, fours(x, s.channels), grad, fours(Array{teach, kFloat32}, s.channels),
             fours(out, s.channels));
  return launch_status();
}

}  // namespace lgk::cuda
