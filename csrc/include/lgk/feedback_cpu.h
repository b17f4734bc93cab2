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

struct FeedbackKernels {
  int (*matrix)(const Feedback&, void* out, int dtype, int threads);
  int (*product)(const Feedback&, const Matrix& grad, int64_t batch, void* out, int dtype, int threads);
  int (*rows)(const Feedback&, const int64_t* index, int64_t count, void* out, int dtype, int threads);
  int (*pack_signs)(const Matrix& weight, int64_t rows, int64_t columns, uint32_t* out, int threads);
  int (*sgd_update)(const Update&, int threads);
};

namespace base { extern const FeedbackKernels feedback; }
namespace avx2 { extern const FeedbackKernels feedback; }
namespace avx512 { extern const FeedbackKernels feedback; }

// Those of the level of lls_kernels().
const FeedbackKernels& feedback_kernels();

}  // namespace lgk
