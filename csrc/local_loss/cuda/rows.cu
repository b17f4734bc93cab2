// Losses of rows that lie side by side: cross entropy of logits, and the similarity of rows against that of labels.
//
// One block owns a row (common/cuda/rows.h) and runs over it as often as there are sums that depend on each other; what
// it reads again lies in the cache.
#include "common/cuda/cross_entropy.h"
#include "common/cuda/rows.h"
#include "local_loss/cuda/kernels.h"

namespace lgk::cuda {
namespace {

constexpr float kEpsNorm = 1e-8f;                  // reference.py, EPS_NORM
constexpr float kRounding = 8.0f * 1.1920929e-7f;  // what rounding leaves of a constant

__global__ void __launch_bounds__(kRowThreads, 2)
    cross_entropy(int64_t classes, float label_smoothing, float grad_scale, bool compute_grad,
                  const int64_t* __restrict__ target, float* logits, float* losses) {
  LGK_DYNAMIC_SHARED(float, shared);
  block_cross_entropy(classes, label_smoothing, grad_scale, compute_grad, target[blockIdx.x],
                      logits + blockIdx.x * classes, losses + blockIdx.x, shared);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2)
    normalize_rows(int64_t features, const T* __restrict__ x, float* __restrict__ rows, float* norms) {
  LGK_DYNAMIC_SHARED(float, shared);
  const int64_t first = blockIdx.x * features;
  Sums sums{0.0f, 0.0f, 0.0f};
  for (int64_t k = threadIdx.x; k < features; k += blockDim.x) {
    const float value = to_float(x[first + k]);
    sums.a += value;
    sums.b += value * value;
  }
  sums = block_sums(sums, shared);
  const float mean = sums.a / static_cast<float>(features), length = sqrtf(sums.b);
  sums = Sums{0.0f, 0.0f, 0.0f};
  for (int64_t k = threadIdx.x; k < features; k += blockDim.x) {
    const float centred = to_float(x[first + k]) - mean;
    sums.a += centred * centred;
  }
  const float norm = sqrtf(block_sums(sums, shared).a);
  const bool varies = !(norm <= kRounding * length);  // nan too
  const float inverse = varies ? 1.0f / (kEpsNorm + norm) : 0.0f;
  if (threadIdx.x == 0) norms[blockIdx.x] = varies ? norm : 0.0f;
  for (int64_t k = threadIdx.x; k < features; k += blockDim.x)
    rows[first + k] = (to_float(x[first + k]) - mean) * inverse;
}

__global__ void __launch_bounds__(kRowThreads, 2)
    match_rows(int64_t batch, float same, float other, const int64_t* __restrict__ target, float* products,
               float* losses) {
  LGK_DYNAMIC_SHARED(float, shared);
  float* const row = products + blockIdx.x * batch;
  const int64_t label = target[blockIdx.x];
  Sums sums{0.0f, 0.0f, 0.0f};
  for (int64_t j = threadIdx.x; j < batch; j += blockDim.x) {
    const float product = row[j] < -1.0f ? -1.0f : row[j] > 1.0f ? 1.0f : row[j];  // nan stays
    const float error = product - (target[j] == label ? same : other);
    row[j] = error;
    sums.a += error * error;
  }
  sums = block_sums(sums, shared);
  const float share = 1.0f / static_cast<float>(batch);
  if (threadIdx.x == 0) losses[blockIdx.x] = sums.a * share * share;
}

__global__ void __launch_bounds__(kRowThreads, 2)
    rows_grad(int64_t features, float positions, float factor, const float* __restrict__ grad,
              const float* __restrict__ rows, const float* __restrict__ norms, const float* __restrict__ deviation,
              const float* __restrict__ mean, float* __restrict__ out) {
  LGK_DYNAMIC_SHARED(float, shared);
  const int64_t first = blockIdx.x * features;
  const float norm = norms[blockIdx.x];
  Sums sums{0.0f, 0.0f, 0.0f};
  for (int64_t k = threadIdx.x; k < features; k += blockDim.x) {
    sums.a += grad[first + k] * rows[first + k];
    sums.b += grad[first + k];
    sums.c += rows[first + k];
  }
  sums = block_sums(sums, shared);
  const float along = sums.a * (1.0f + kEpsNorm / norm), inverse = factor / (kEpsNorm + norm);
  const float centre = (sums.b - along * sums.c) / static_cast<float>(features);
  for (int64_t k = threadIdx.x; k < features; k += blockDim.x) {
    float value = norm != 0.0f ? (grad[first + k] - along * rows[first + k] - centre) * inverse : 0.0f;
    if (deviation != nullptr) {
      const float std = deviation[first + k];
      value = std <= kRounding * fabsf(mean[first + k]) ? 0.0f : value / (std * (positions - 1.0f));
    }
    out[first + k] = value;
  }
}

}  // namespace

int local_loss_cross_entropy(int64_t batch, int64_t classes, float label_smoothing, float grad_scale, bool compute_grad,
                             const int64_t* target, float* logits, float* losses, void* stream) {
  if (batch == 0) return 0;
  LGK_LAUNCH(cross_entropy, dim3(batch), dim3(row_threads(classes)), kRowShared, stream, classes, label_smoothing,
             grad_scale, compute_grad, target, logits, losses);
  return launch_status();
}

int local_loss_normalize_rows(int64_t batch, int64_t features, int dtype, const void* x, float* rows, float* norms,
                              void* stream) {
  if (batch == 0) return 0;
  return with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    LGK_LAUNCH(normalize_rows<T>, dim3(batch), dim3(row_threads(features)), kRowShared, stream, features,
               static_cast<const T*>(x), rows, norms);
    return launch_status();
  });
}

int local_loss_match_rows(int64_t batch, float same, float other, const int64_t* target, float* products, float* losses,
                          void* stream) {
  if (batch == 0) return 0;
  LGK_LAUNCH(match_rows, dim3(batch), dim3(row_threads(batch)), kRowShared, stream, batch, same, other, target,
             products, losses);
  return launch_status();
}

int local_loss_rows_grad(int64_t batch, int64_t features, int64_t positions, float factor, const float* grad,
                         const float* rows, const float* norms, const float* deviation, const float* mean, float* out,
                         void* stream) {
  if (batch == 0) return 0;
  LGK_LAUNCH(rows_grad, dim3(batch), dim3(row_threads(features)), kRowShared, stream, features,
             static_cast<float>(positions), factor, grad, rows, norms, deviation, mean, out);
  return launch_status();
}

}  // namespace lgk::cuda
