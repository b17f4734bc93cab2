// The CPU kernels of the families local_loss and offset: what one instruction-set level offers, and the choice. Every
// function returns a status (0: ok) and takes raw pointers; formulas: reference.py of each family.
#pragma once
#include <cstdint>

#include "lgk/dtypes.h"

namespace lgk {

// (batch, channels, positions), or with `channels_last` (batch, positions, channels); samples are dense.
struct FeatureMap {
  const void* data;
  int64_t batch, channels, positions, batch_stride;
  bool channels_last;
  int dtype;
};

struct Goodness {
  const void* data;  // (batch, size), dense
  int64_t batch, size;
  int dtype;
  const bool* is_positive;
  double threshold, factor;
  float *loss, *kappa, *squares;  // (), (batch) or null, (batch)
};

// Cross entropy of logits, or with `pooled` of pooled @ weight^T + bias, whose products are made here: for sizes where
// calling the library's costs more than the arithmetic.
struct LogitLoss {
  int64_t batch, classes, channels;
  const float *pooled, *weight, *bias;  // (batch, channels) or null; (classes, channels), (classes) or null
  const float* logits;                  // (batch, classes) where there is no `pooled`
  const int64_t* target;
  float smoothing;
  double divisor;
  bool none;
  float *loss,
      *grad;  // () or, with `none`, (batch); (batch, classes) = (softmax - smoothed one-hot) / divisor, or null
  float* grad_pooled;  // (batch, channels) = pooled_scale * grad @ weight, or null
  float pooled_scale;
};

// One parameter of an optimizer step, `size` float32 values and as many of the others; null where there is none.
struct OffsetTensor {
  float* param;
  const float* grad;
  float* momentum_buffer;
  const void* offset;
  int64_t size, offset_dtype;
};

// g = scale * grad + tilt * offset + decay * w;  v = momentum * v + g;  w -= rate * v
struct OffsetStep {
  float rate, momentum, decay, scale, tilt;
};

struct LocalLossKernels {
  // mean (batch, channels) over the positions; var: unbiased, or null
  int (*moments)(const FeatureMap&, float* mean, float* var, int threads);
  // out = (x - shift) * scale, shift (null: 0) and scale (batch, channels), in x's layout, samples dense
  int (*scale_shifted)(const FeatureMap&, const float* shift, const float* scale, void* out, int threads);
  int (*logit_loss)(const LogitLoss&, int threads);
  int (*goodness)(const Goodness&, int threads);
  int (*offset_sgd)(const OffsetTensor*, int64_t count, const OffsetStep&, int threads);
};

namespace base {
extern const LocalLossKernels local_loss;
}
namespace avx2 {
extern const LocalLossKernels local_loss;
}
namespace avx512 {
extern const LocalLossKernels local_loss;
}

// Those of the level of lls_kernels().
const LocalLossKernels& local_loss_kernels();

}  // namespace lgk
