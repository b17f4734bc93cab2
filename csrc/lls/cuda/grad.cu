// LLS block, gradients: dgamma and dbeta from s1 and s2, dz in place of z, and the unfused gradient of an activation.
//
//   dgamma_c = sum over batch and bins of grad / area * s2,  dbeta_c = ... * s1
//   dz = gamma rstd scale (lambda unpool(grad_latents) - (dbeta + xhat dgamma) / N),  N = batch * height * width
//
// Work is divided as in lls_norm.cu, by the positions that each bin owns.
#include "lls/cuda/finish.h"

namespace lgk::cuda {
namespace {

struct LatentGrad {
  const float *latents, *gamma, *beta;
  float scale, inverse_count;
};

// dz = lambda gain grad_a - (offset + (z - mean) slope)
struct Gradient {
  float gain, offset, slope;
};

LGK_DEVICE Gradient gradient(const Norm& norm, const Channel& p, const LatentGrad& grad, int c) {
  const float gain = p.gain * grad.scale, mean_gain = gain * grad.inverse_count;
  return Gradient{gain, mean_gain * grad.beta[c], mean_gain * grad.gamma[c] * rstd(norm, c)};
}

// `scaled` = gain * grad_a
LGK_DEVICE float grad_z(const Channel& p, const Gradient& g, float slope, float scaled, float z) {
  const float centred = z - p.mean;
  return (preactivation(p, centred) > 0.0f ? scaled : slope * scaled) - fmaf(centred, g.slope, g.offset);
}

// channels_last, bins that do not overlap: the gradient of the activation is one number a bin and channel.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_preactivation_nhwc(Image s, Norm norm, LatentGrad grad, bool aligned, T* __restrict__ z) {
  constexpr int V = kVector<T>;
  const int tiles = ceil_div(s.channels, static_cast<int>(blockDim.x) * V);
  const int tile = blockIdx.x % tiles, cell = blockIdx.x / tiles;
  const int j = cell % s.pool_columns, i = cell / s.pool_columns % s.pool_rows;
  const int64_t b = cell / s.pool_columns / s.pool_rows;
  const int rows = s.height / s.pool_rows, columns = s.width / s.pool_columns, area = rows * columns;
  const int c0 = (tile * blockDim.x + threadIdx.x) * V, channels = s.channels - c0;
  if (channels <= 0) return;

  const int bins = s.pool_rows * s.pool_columns;
  const float* const latents = grad.latents + (b * s.channels + c0) * bins + i * s.pool_columns + j;
  Channel p[V];
  Gradient g[V];
  float scaled[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int c = v < channels ? v : 0;
    p[v] = channel(norm, c0 + c);
    g[v] = gradient(norm, p[v], grad, c0 + c);
    scaled[v] = g[v].gain * (latents[c * bins] / static_cast<float>(area));
  }
  T* const corner = z + ((b * s.height + i * rows) * s.width + j * columns) * s.channels + c0;
  for (int first = threadIdx.y; first < area; first += blockDim.y * kLoads) {
    Pack<T, V> pack[kLoads];
    int offset[kLoads];
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int k = first + q * blockDim.y;
      offset[q] = k < area ? (k / columns * s.width + k % columns) * s.channels : -1;
      if (offset[q] >= 0) pack[q] = load<T, V>(corner + offset[q], channels, aligned);
    }
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      if (offset[q] < 0) continue;
      float dz[V];
#pragma unroll
      for (int v = 0; v < V; ++v)
        dz[v] = grad_z(p[v], g[v], norm.negative_slope, scaled[v], to_float(pack[q].element[v]));
      store<T, V>(corner + offset[q], dz, channels, aligned);
    }
  }
}

// NCHW, bins that do not overlap and are whole 16-byte vectors.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_preactivation_nchw(Image s, Norm norm, LatentGrad grad, int lanes_x, int64_t items, T* __restrict__ z) {
  constexpr int V = kVector<T>;
  const int64_t item = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (item >= items) return;
  const int x = threadIdx.x % lanes_x, y = threadIdx.x / lanes_x, lanes_y = 32 / lanes_x;
  const int64_t plane = item / s.pool_rows;
  const int c = static_cast<int>(plane % s.channels);
  const int rows = s.height / s.pool_rows, columns = s.width / s.pool_columns;
  const Channel p = channel(norm, c);
  const Gradient g = gradient(norm, p, grad, c);
  T* const corner = z + item * rows * s.width;  // of the row of bins

  for (int w0 = x * V; w0 < s.width; w0 += lanes_x * V) {
    const float latent = grad.latents[item * s.pool_columns + w0 / columns];
    const float scaled = g.gain * (latent / static_cast<float>(rows * columns));
    for (int first = y; first < rows; first += lanes_y * kLoads) {
      Pack<T, V> pack[kLoads];
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int row = first + q * lanes_y;
        if (row < rows) pack[q] = load<T, V>(corner + row * s.width + w0, V, true);
      }
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int row = first + q * lanes_y;
        if (row >= rows) continue;
        float dz[V];
#pragma unroll
        for (int v = 0; v < V; ++v) dz[v] = grad_z(p, g, norm.negative_slope, scaled, to_float(pack[q].element[v]));
        store<T, V>(corner + row * s.width + w0, dz, V, true);
      }
    }
  }
}

// Any bins and layout, one thread a 16-byte vector. BLOCK: dz in place of z; else the gradient of the activation,
// scale * unpool(grad_latents), with `scale` one float or, with scale_per_row, one a sample.
template <typename T, bool BLOCK>
__global__ void __launch_bounds__(kThreads, 2)
    unpool_grad(Image s, bool even, Norm norm, LatentGrad grad, const float* __restrict__ scale, bool scale_per_row,
                bool aligned, T* __restrict__ values) {
  constexpr int V = kVector<T>;
  // Dimensions from the inside: (channels, width, height) or (width, height, channels).
  const int inner = s.channels_last ? s.channels : s.width, middle = s.channels_last ? s.width : s.height;
  const int outer = s.channels_last ? s.height : s.channels, vectors = ceil_div(inner, V);
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, line = index / vectors;
  const int64_t b = line / middle / outer;
  if (b >= s.batch) return;
  const int k0 = static_cast<int>(index % vectors) * V, count = inner - k0;
  const int m = static_cast<int>(line % middle), o = static_cast<int>(line / middle % outer);
  const int bins = s.pool_rows * s.pool_columns;
  const float* const sample = grad.latents + b * s.channels * bins;
  T* const address = values + line * inner + k0;
  const float factor = BLOCK ? 1.0f : scale[scale_per_row ? b : 0];
  Pack<T, V> pack;
  if (BLOCK) pack = load<T, V>(address, count, aligned);
  float result[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int k = v < count ? k0 + v : k0;
    const int c = s.channels_last ? k : o, h = s.channels_last ? o : m, w = s.channels_last ? m : k;
    const float grad_a = unpool(s, even, sample + c * bins, h, w);
    if (BLOCK) {
      const Channel p = channel(norm, c);
      const Gradient g = gradient(norm, p, grad, c);
      result[v] = grad_z(p, g, norm.negative_slope, g.gain * grad_a, to_float(pack.element[v]));
    } else {
      result[v] = factor * grad_a;
    }
  }
  store<T, V>(address, result, count, aligned);
}

template <typename T, bool BLOCK>
int launch_unpool_grad(const Image& s, const Norm& norm, const LatentGrad& grad, const float* scale, bool scale_per_row,
                       void* values, void* stream) {
  constexpr int V = kVector<T>;
  const int inner = s.channels_last ? s.channels : s.width;
  const int64_t lines = s.batch * s.height * (s.channels_last ? s.width : s.channels);
  LGK_LAUNCH((unpool_grad<T, BLOCK>), dim3(ceil_div<int64_t>(lines * ceil_div(inner, V), kThreads)), dim3(kThreads), 0,
             stream, s, divides_evenly(s), norm, grad, scale, scale_per_row, is_aligned(values, 16) && inner % V == 0,
             static_cast<T*>(values));
  return launch_status();
}

// Block (columns, rows of the batch) on `block_channels` channels, so that a thread's columns share a channel. The
// blocks behind the last channel finish the head.
__global__ void __launch_bounds__(kThreads, 2)
    norm_grads(int64_t batch, int channels, int bins, int block_channels, const float* __restrict__ grad_latents,
               const float* __restrict__ s1, const float* __restrict__ s2, const float* __restrict__ area,
               float* __restrict__ grad_gamma, float* __restrict__ grad_beta, float* __restrict__ grad_bias,
               Finish finish) {
  LGK_DYNAMIC_SHARED(float, partial);  // (2, blockDim.y, blockDim.x)
  const int blocks = ceil_div(channels, block_channels);
  if (static_cast<int>(blockIdx.x) >= blocks) {
    finish_head(finish, blockIdx.x - blocks, partial);
    return;
  }
  const int c0 = blockIdx.x * block_channels, columns = min(block_channels, channels - c0) * bins;
  float gamma = 0.0f, beta = 0.0f;
  for (int64_t b = threadIdx.y; b < batch; b += blockDim.y) {
    const int64_t row = (b * channels + c0) * bins;
    for (int k = threadIdx.x; k < columns; k += blockDim.x) {
      const float g = grad_latents[row + k] / area[k % bins];
      gamma += g * s2[row + k];
      beta += g * s1[row + k];
    }
  }
  const int slots = blockDim.x * blockDim.y, slot = threadIdx.y * blockDim.x + threadIdx.x;
  partial[slot] = gamma;
  partial[slots + slot] = beta;
  __syncthreads();
  const int c = threadIdx.x;
  if (threadIdx.y > 1 || c >= block_channels || c0 + c >= channels) return;
  const int begin = block_channels == 1 ? 0 : c * bins;
  const int end = block_channels == 1 ? static_cast<int>(blockDim.x) : begin + bins;
  float sum = 0.0f;
  for (int y = 0; y < static_cast<int>(blockDim.y); ++y)
    for (int x = begin; x < end; ++x) sum += partial[threadIdx.y * slots + y * blockDim.x + x];
  (threadIdx.y == 0 ? grad_gamma : grad_beta)[c0 + c] = sum;
  if (threadIdx.y == 0) grad_bias[c0 + c] = 0.0f;  // the normalisation cancels the layer's bias
}

}  // namespace

int lls_grad_preactivation(const Image& s, const Norm& norm, void* z, const float* grad_latents,
                           const float* grad_gamma, const float* grad_beta, float scale, void* stream) {
  const int64_t plane = int64_t{s.height} * s.width;
  if (s.batch * s.channels * plane == 0) return 0;
  if (!fits(s)) return kInvalidArgument;
  const LatentGrad grad{grad_latents, grad_gamma, grad_beta, scale, 1.0f / static_cast<float>(s.batch * plane)};
  return with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int V = kVector<T>;
    T* const values = static_cast<T*>(z);
    if (s.channels_last && divides_evenly(s)) {
      const int x = power_of_two_from(ceil_div(s.channels, V), 32);
      const int area = s.height / s.pool_rows * (s.width / s.pool_columns);
      const int y = power_of_two_from(std::max(area / kLoads, 32 / x), kThreads / x);
      const int64_t blocks = s.batch * s.pool_rows * s.pool_columns * ceil_div(s.channels, x * V);
      LGK_LAUNCH((grad_preactivation_nhwc<T>), dim3(blocks), dim3(x, y), 0, stream, s, norm, grad,
                 is_aligned(z, 16) && s.channels % V == 0, values);
      return launch_status();
    }
    if (!s.channels_last && s.height % s.pool_rows == 0 && bins_are_whole_vectors(s, V) && is_aligned(z, 16)) {
      const int64_t items = s.batch * s.channels * s.pool_rows;
      const int warps = kThreads / 32;
      LGK_LAUNCH((grad_preactivation_nchw<T>), dim3(ceil_div<int64_t>(items, warps)), dim3(32, warps), 0, stream, s,
                 norm, grad, row_lanes(s, V), items, values);
      return launch_status();
    }
    return launch_unpool_grad<T, true>(s, norm, grad, nullptr, false, z, stream);
  });
}

int lls_expand_grad(const Image& s, const float* grad_latents, const float* scale, bool scale_per_row, void* out,
                    void* stream) {
  if (s.batch * s.channels * s.height * s.width == 0) return 0;
  if (!fits(s)) return kInvalidArgument;
  return with_dtype(s.dtype, [&](auto element) {
    using T = decltype(element);
    return launch_unpool_grad<T, false>(s, Norm{}, LatentGrad{grad_latents, nullptr, nullptr, 1.0f, 1.0f}, scale,
                                        scale_per_row, out, stream);
  });
}

int lls_norm_grads(int64_t batch, int channels, int bins, const float* grad_latents, const float* s1, const float* s2,
                   const float* area, float* grad_gamma, float* grad_beta, float* grad_bias, const Finish& finish,
                   void* stream) {
  const int block_channels = std::max(32 / bins, 1);
  const int blocks = ceil_div(channels, block_channels) + finish_blocks(finish);
  if (blocks == 0) return 0;
  LGK_LAUNCH(norm_grads, dim3(blocks), dim3(32, kWarps), kFinishShared, stream, batch, channels, bins, block_channels,
             grad_latents, s1, s2, area, grad_gamma, grad_beta, grad_bias, finish);
  return launch_status();
}

}  // namespace lgk::cuda
