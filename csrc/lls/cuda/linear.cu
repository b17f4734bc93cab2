// LLS linear block, z (batch, features): everything is small enough for the L2 cache, so the kernels are plain.
//
//   xhat, u, a, lambda as in lls_norm.cu; latents (batch, pool): mean of a over each bin of the features
//   dgamma = sum over the batch of g_u xhat, dbeta = of g_u, with g_u = lambda unpool(grad_latents); dz as in
//   lls_grad.cu
#include "lls/cuda/finish.h"

namespace lgk::cuda {
namespace {

// One thread a latent: it also writes the activations that its bin owns.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    linear_norm_act_pool(int64_t batch, int features, int pool, Norm norm, const T* __restrict__ z, T* __restrict__ out,
                         float* __restrict__ latents) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= batch * pool) return;
  const int64_t row = index / pool * features;
  const Span bin = span(static_cast<int>(index % pool), features, pool);
  float sum = 0.0f;
  for (int k = bin.begin; k < bin.end; ++k) {
    const Channel p = channel(norm, k);
    const float u = preactivation(p, to_float(z[row + k]) - p.mean);
    const float a = u > 0.0f ? u : norm.negative_slope * u;
    sum += a;
    if (out != nullptr && bin.owns(k)) out[row + k] = from_float<T>(a);
  }
  latents[index] = sum / static_cast<float>(bin.end - bin.begin);
}

// Block (features, rows of the batch): sums over the batch, then dz. The blocks behind the last feature finish the
// head.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    linear_grad_preactivation(int64_t batch, int features, int pool, Norm norm, T* __restrict__ z,
                              const float* __restrict__ grad_latents, float scale, float* __restrict__ grad_gamma,
                              float* __restrict__ grad_beta, float* __restrict__ grad_bias, Finish finish) {
  LGK_DYNAMIC_SHARED(float, partial);  // (2, blockDim.y, blockDim.x)
  const int blocks = ceil_div(features, static_cast<int>(blockDim.x));
  if (static_cast<int>(blockIdx.x) >= blocks) {
    finish_head(finish, blockIdx.x - blocks, partial);
    return;
  }
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  const bool inside = k < features;
  const Image s{batch, 1, 1, features, 1, pool, false, 0};
  const Channel p = channel(norm, inside ? k : 0);
  const float inverse_std = rstd(norm, inside ? k : 0);
  float gamma = 0.0f, beta = 0.0f;
  if (inside) {
    for (int64_t b = threadIdx.y; b < batch; b += blockDim.y) {
      const float centred = to_float(z[b * features + k]) - p.mean;
      const float g = unpool(s, features % pool == 0, grad_latents + b * pool, 0, k);
      const float grad_u = preactivation(p, centred) > 0.0f ? g : norm.negative_slope * g;
      gamma += grad_u * (centred * inverse_std);
      beta += grad_u;
    }
  }
  const int slots = blockDim.x * blockDim.y, slot = threadIdx.y * blockDim.x + threadIdx.x;
  partial[slot] = gamma;
  partial[slots + slot] = beta;
  __syncthreads();
  gamma = beta = 0.0f;
  for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
    gamma += partial[y * blockDim.x + threadIdx.x];
    beta += partial[slots + y * blockDim.x + threadIdx.x];
  }
  if (!inside) return;
  if (threadIdx.y == 0) {
    grad_gamma[k] = gamma;
    grad_beta[k] = beta;
    grad_bias[k] = 0.0f;  // the normalisation cancels the layer's bias
  }
  const float gain = p.gain * scale, inverse_count = 1.0f / static_cast<float>(batch);
  for (int64_t b = threadIdx.y; b < batch; b += blockDim.y) {
    const float centred = to_float(z[b * features + k]) - p.mean;
    const float g = unpool(s, features % pool == 0, grad_latents + b * pool, 0, k);
    const float grad_u = preactivation(p, centred) > 0.0f ? g : norm.negative_slope * g;
    z[b * features + k] = from_float<T>(gain * (grad_u - (beta + centred * inverse_std * gamma) * inverse_count));
  }
}

Image as_image(const Rows& rows) { return {rows.batch, 1, 1, rows.features, 1, rows.pool, false, rows.dtype}; }

}  // namespace

int lls_linear_norm_act_pool(const Rows& rows, const Norm& norm, const void* z, void* out, float* latents,
                             void* stream) {
  if (rows.batch == 0) return 0;
  if (!fits(as_image(rows))) return kInvalidArgument;
  return with_dtype(rows.dtype, [&](auto element) {
    using T = decltype(element);
    LGK_LAUNCH((linear_norm_act_pool<T>), dim3(ceil_div<int64_t>(rows.batch * rows.pool, kThreads)), dim3(kThreads), 0,
               stream, rows.batch, rows.features, rows.pool, norm, static_cast<const T*>(z), static_cast<T*>(out),
               latents);
    return launch_status();
  });
}

int lls_linear_grad_preactivation(const Rows& rows, const Norm& norm, void* z, const float* grad_latents, float scale,
                                  float* grad_gamma, float* grad_beta, float* grad_bias, const Finish& finish,
                                  void* stream) {
  if (!fits(as_image(rows))) return kInvalidArgument;
  return with_dtype(rows.dtype, [&](auto element) {
    using T = decltype(element);
    LGK_LAUNCH((linear_grad_preactivation<T>), dim3(ceil_div(rows.features, 32) + finish_blocks(finish)),
               dim3(32, kWarps), kFinishShared, stream, rows.batch, rows.features, rows.pool, norm, static_cast<T*>(z),
               grad_latents, scale, grad_gamma, grad_beta, grad_bias, finish);
    return launch_status();
  });
}

}  // namespace lgk::cuda
