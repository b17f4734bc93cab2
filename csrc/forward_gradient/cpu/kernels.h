// The CPU kernels of the family forward_gradient: what one instruction-set level offers.
// Formulas: lgkernels/ops/forward_gradient/reference.py. Tensors are contiguous.
#pragma once
#include <cstdint>

#include "common/cpu/level.h"
#include "common/formula.h"

namespace lgk::cpu {

struct Array {
  void* data;  // null: there is none
  int dtype;
};

struct FeatureShape {
  int64_t samples, patches, groups, channels;
};

// A tensor as (outer, length, inner) about the dimension of the norm; `sample`: elements of a sample.
struct NormShape {
  int64_t outer, length, inner, sample;
  float eps;
  bool relu;
};

struct ForwardGradientKernels {
  // out (samples, groups * channels)
  int (*pooled)(const FeatureShape&, const Array& x, bool layer_norm, float* out, int threads);
  // delta (rows, classes) = softmax - one-hot
  int (*softmax)(const float* logits, const int64_t* target, int64_t rows, int64_t classes, float* delta, float* loss,
                 int threads);
  // out (samples, patches, groups); x may be none, head (samples) null
  int (*tangent)(const FeatureShape&, const Array& x, const Array& x_tangent, const float* teach, const float* head,
                 float* out, int threads);
  int (*cotangent)(const FeatureShape&, const Array& x, const float* grad, const float* teach, const Array& out,
                   int threads);
  // The noise is a tensor, by a law whose rows are samples, or neither. y and y_tangent (or null) of z's dtype.
  int (*dual_norm)(const NormShape&, const Array& z, const Array& z_tangent, const Array& residual, const Array& noise,
                   const Formula& law, void* y, void* y_tangent, int threads);
  // coefficient (outer, runs, inner); out of z's dtype
  int (*activity_grad)(const NormShape&, const Array& z, const Array& y, const float* coefficient, int64_t runs,
                       const Array& noise, const Formula& law, void* out, int threads);
};

LGK_LEVELS(ForwardGradientKernels, forward_gradient)

}  // namespace lgk::cpu
