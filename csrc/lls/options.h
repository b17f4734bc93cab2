// What describes an LLS head on both processors (lgkernels/ops/lls/reference.py defines what it computes).
#pragma once
#include <cstdint>

#include "common/dtypes.h"

namespace lgk {

enum HeadLoss : int { kCrossEntropy = 0, kHardSigmoidMse = 1 };
enum Reduction : int { kMean = 0, kSum = 1, kNone = 2 };

struct HeadOptions {
  int num_classes;
  float temperature, label_smoothing;
  bool normalize;
  float eps;
  bool zero_gradient_below_eps;
  float basis_scale;
  HeadLoss loss;
  int64_t ignore_index;
  Reduction reduction;

  // What becomes of a gradient of x / eps, for latents x whose norm is below eps.
  LGK_HD float below_eps(float gradient) const { return zero_gradient_below_eps ? 0.0f : gradient / eps; }
};

// The modulation's gradient: sum over the batch of scale g s (vector), or s^T (scale g). No scale: 1.
struct ModulationGrad {
  int64_t batch;
  int rows, classes;
  bool vector;
  const float *similarity, *grad_logits, *scale;
  bool scale_per_row;
  float* grad;
};

}  // namespace lgk
