// The CPU kernels of the family direct: what one instruction-set level offers.
// Formulas: lgkernels/ops/direct/reference.py.
#pragma once
#include "common/cpu/level.h"
#include "common/formula.h"
#include "common/norm.h"

namespace lgk::cpu {

// Batch norm in training, leaky ReLU, and a 2x2 max-pool or none, of a convolution's output in planes, float32.
struct DirectBlock {
  int64_t batch, channels, height, width;
  float* z;  // (batch, channels, height, width)
  const float *gamma, *beta;
  float *mean, *rstd;  // (channels) of the batch
  float negative_slope;
  bool max_pool;
};

struct DirectKernels {
  int (*direct_forward)(const DirectBlock&, float* running_mean, float* running_var, float momentum, float eps,
                        float* out, int threads);
  // z becomes its gradient. The gradient of the block's output is `delta`, or where that is null error (batch, rows of
  // the feedback) @ F, never stored as a whole.
  int (*direct_backward)(const DirectBlock&, const float* delta, const Formula&, const Matrix& error, float* grad_gamma,
                         float* grad_beta, int threads);
};

LGK_LEVELS(DirectKernels, direct)

}  // namespace lgk::cpu
