// The CUDA entry points of the family local_loss (lgkernels/ops/local_loss/reference.py defines what they compute).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include <cstdint>

namespace lgk::cuda {

// A dense tensor as planes of `positions` elements: (planes, positions), or with channels > 1
// (planes / channels, positions, channels), whose planes are single channels of single samples.
struct Planes {
  int64_t planes, positions;
  int channels, dtype;
};

// mean (planes); deviation (planes), the unbiased standard deviation, unless nullptr.
int local_loss_moments(const Planes& shape, const void* x, float* mean, float* deviation, void* stream);

// squares (planes) = sums of squares; channels must be 1. partial: splits * planes floats of scratch.
// loss = mean of softplus(s (threshold - factor * squares)), s = +-1; kappa (planes) unless nullptr.
int local_loss_goodness_splits(const Planes& shape);
int local_loss_goodness(const Planes& shape, const void* x, const uint8_t* is_positive, float threshold, float factor,
                        float* partial, float* squares, float* kappa, float* loss, void* stream);

// out = (x - mean) * factor * *scale, mean (nullptr: 0) and factor one value a plane; out is laid out as x.
int local_loss_scale(const Planes& shape, const void* x, const float* mean, const float* factor, const float* scale,
                     void* out, void* stream);

// losses (batch) of logits (batch, classes); with `compute_grad` grad_scale times their gradients replace the logits.
int local_loss_cross_entropy(int64_t batch, int64_t classes, float label_smoothing, float grad_scale, bool compute_grad,
                             const int64_t* target, float* logits, float* losses, void* stream);

// rows = (x - mean of the row) / (1e-8 + norm), and the norms (batch); both 0 where only rounding varies in a row.
int local_loss_normalize_rows(int64_t batch, int64_t features, int dtype, const void* x, float* rows, float* norms,
                              void* stream);
// products (batch, batch) of rows <- clamp(products, -1, 1) - (same or other: the labels'); losses (batch) = its
// sums of squares / batch^2.
int local_loss_match_rows(int64_t batch, float same, float other, const int64_t* target, float* products, float* losses,
                          void* stream);
// The gradient `factor * grad` of rows taken through the normalisation, and with `deviation` (batch, features; mean
// alike) through that of `positions` values: the factor of (x - mean) in the gradient of x.
int local_loss_rows_grad(int64_t batch, int64_t features, int64_t positions, float factor, const float* grad,
                         const float* rows, const float* norms, const float* deviation, const float* mean, float* out,
                         void* stream);

}  // namespace lgk::cuda
