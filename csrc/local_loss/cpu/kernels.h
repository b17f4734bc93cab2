// The CPU kernels of the family local_loss: what one instruction-set level offers.
// Formulas: lgkernels/ops/local_loss/reference.py.
#pragma once
#include <cstdint>

#include "common/cpu/level.h"

namespace lgk::cpu {

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

// Logits, or what they are made of here, for sizes where calling the library's product costs more than the arithmetic:
// pooled @ weight^T + bias.
struct LogitInputs {
  int64_t batch, classes, channels;
  const float *pooled, *weight, *bias;  // (batch, channels) or null; (classes, channels), (classes) or null
  const float* logits;                  // (batch, classes) where there is no `pooled`
  const int64_t* target;
};

struct LogitOutputs {
  float* loss;         // () or, without reduction, (batch)
  float* grad;         // (batch, classes) = (softmax - smoothed one-hot) / divisor, or null
  float* grad_pooled;  // (batch, channels) = pooled_scale * grad @ weight, or null
  float pooled_scale;
};

struct LocalLossKernels {
  // mean (batch, channels) over the positions; var: unbiased, or null
  int (*moments)(const FeatureMap&, float* mean, float* var, int threads);
  // out = (x - shift) * scale, shift (null: 0) and scale (batch, channels), in x's layout, samples dense
  int (*scale_shifted)(const FeatureMap&, const float* shift, const float* scale, void* out, int threads);
  // cross entropy; the loss's divisor is `divisor` (of its mean: batch)
  int (*logit_loss)(const LogitInputs&, float label_smoothing, double divisor, bool none, const LogitOutputs&,
                    int threads);
  int (*goodness)(const Goodness&, int threads);
};

LGK_LEVELS(LocalLossKernels, local_loss)

}  // namespace lgk::cpu
