// Batch norm with a leaky ReLU, as the kernels of both processors take it.
#pragma once
#include <cstdint>

namespace lgk {

// xhat = (z - mean) * rstd, u = gamma * xhat + beta, a = u > 0 ? u : negative_slope * u
struct Norm {
  const float *mean, *rstd, *gamma, *beta;
  float negative_slope;
};

// Statistics of a batch, (channels) each, and the running ones that they move. The layer's bias is no part of z, but
// of the running mean.
struct BatchStatistics {
  const float* bias;                  // null: none
  float *running_mean, *running_var;  // null: not kept
  float momentum, eps;
  float *mean, *rstd;  // results
};

}  // namespace lgk
