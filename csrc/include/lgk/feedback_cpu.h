// The CPU kernels of the family feedback: what one instruction-set level offers, and the choice between levels.
// Every function returns a status (0: ok) and takes raw pointers to matrices whose rows are dense, with a row stride
// in elements; formulas: ops/feedback/reference.py.
#pragma once
#include <cstdint>

#include "lgk/dtypes.h"
#include "lgk/philox.h"

namespace lgk {

constexpr int kPackedSigns = 3;  // beside Dtype: uint32 words, bit j % 32 of word j / 32 set where negative

struct Matrix {
  const void* data;  // null: there is none
  int64_t stride;
  int dtype;
};

// F (rows, columns) = scale * value without weight, scale * |value| * sign(weight) with one.
struct Feedback {
  int64_t rows, columns;
  Matrix weight, magnitude;
  const int64_t* state;  // (seed, stream, step) of `law`, or null; value is 1 without magnitude and law
  Law law;
  Range range;
  float scale;
  bool sign_plus;
};

// SGD's and Batch Manhattan's step with the gradient grad_scale * grad^T x that is never stored.
struct Update {
  int64_t rows, columns, batch;
  void *weight, *momentum_buffer;  // (rows, columns) of `dtype`; momentum_buffer may be null
  int64_t weight_stride, buffer_stride;
  int dtype;
  Matrix grad, x;  // (batch, rows) and (batch, columns)
  float rate, momentum, dampening, decay, grad_scale;
  bool nesterov, manhattan;
};

// Batch norm in training, leaky ReLU, and a 2x2 max-pool or none, of a convolution's output in planes, float32.
struct DirectBlock {
  int64_t batch, channels, height, width;
  float* z;  // (batch, channels, height, width)
  const float *gamma, *beta;
  float *mean, *rstd;  // (channels) of the batch
  float slope;
  bool max_pool;
};

// The adjoint of a convolution's windows: columns (batch, positions, channels, kernel) summed into maps (batch,
// channels, height, width). Pairs are of rows and columns.
struct Fold {
  int64_t batch, channels, height, width;
  int64_t kernel[2], positions[2], stride[2], padding[2], dilation[2];
};

struct FeedbackKernels {
  int (*matrix)(const Feedback&, void* out, int dtype, int threads);
  int (*product)(const Feedback&, const Matrix& grad, int64_t batch, void* out, int dtype, int threads);
  int (*rows)(const Feedback&, const int64_t* index, int64_t count, void* out, int dtype, int threads);
  int (*fold)(const Fold&, const float* columns, float* out, int threads);
  int (*pack_signs)(const Matrix& weight, int64_t rows, int64_t columns, uint32_t* out, int threads);
  int (*sgd_update)(const Update&, int threads);
  int (*direct_forward)(const DirectBlock&, float* running_mean, float* running_var, float momentum, float eps,
                        float* out, int threads);
  // z becomes its gradient. The gradient of the block's output is `delta`, or where that is null error (batch, rows of
  // the feedback) @ F, never stored as a whole.
  int (*direct_backward)(const DirectBlock&, const float* delta, const Feedback&, const Matrix& error,
                         float* grad_gamma, float* grad_beta, int threads);
};

namespace base {
extern const FeedbackKernels feedback;
}
namespace avx2 {
extern const FeedbackKernels feedback;
}
namespace avx512 {
extern const FeedbackKernels feedback;
}

// Those of the level of lls_kernels().
const FeedbackKernels& feedback_kernels();

}  // namespace lgk
