// The CUDA entry points of the family forward_gradient (lgkernels/ops/forward_gradient/reference.py defines what they
// compute). Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises. Tensors are
// contiguous.
#pragma once
#include <cstdint>

#include "common/formula.h"

namespace lgk::cuda {

struct Array {
  const void* data;  // null: there is none
  int dtype;
};

// (samples, patches, groups, channels)
struct Features {
  int64_t samples;
  int patches, groups, channels;
};

// out (samples, groups, channels): the mean over the patches of x, or of LN_C(x) for groups of at most 128 channels.
int forward_gradient_pooled(const Features& shape, const Array& x, bool layer_norm, float* out, void* stream);

// Of pooled (rows, width) and weight (width, classes), at most 32 classes: loss (rows), delta (rows, classes) and teach
// (rows, width).
int forward_gradient_head(int64_t rows, int width, int classes, const float* pooled, const Array& weight,
                          const Array& bias, const int64_t* target, float* loss, float* delta, float* teach,
                          void* stream);

// loss (rows) of logits (rows, classes); logits <- softmax(logits) - one-hot.
int forward_gradient_softmax(int64_t rows, int64_t classes, const int64_t* target, float* logits, float* loss,
                             void* stream);

// out (samples, patches, groups) of x_tangent, teach (samples, groups, channels) and head (samples; nullptr: 0).
int forward_gradient_tangent(const Features& shape, const Array& x, const Array& x_tangent, const float* teach,
                             const float* head, float* out, void* stream);
int forward_gradient_cotangent(const Features& shape, const Array& x, const float* grad, const float* teach,
                               const Array& out, void* stream);

// z (outer, channels, inner), outer = samples * per_sample. The coefficient is (outer, runs, inner).
struct Layer {
  int64_t outer, inner, per_sample;
  int channels, runs;
  float eps;
  bool relu;
};

// Noise is `values`, or by a formula with a state, or none. out_tangent: nullptr where it is not wanted.
int forward_gradient_dual_norm(const Layer& layer, const Array& z, const Array& z_tangent, const Array& residual,
                               const Array& values, const Formula& law, void* out, void* out_tangent, void* stream);
int forward_gradient_activity_grad(const Layer& layer, const Array& z, const Array& activity, const float* coefficient,
                                   const Array& values, const Formula& law, void* out, void* stream);

}  // namespace lgk::cuda
