// The CUDA entry points of the family feedback (lgkernels/ops/feedback/reference.py defines what they compute).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include <cstdint>

#include "lgk/dtypes.h"
#include "lgk/philox.h"

namespace lgk {

// A strided tensor of one of the three dtypes; strides in elements.
struct Operand {
  const void* data;
  int dtype;
  int64_t row_stride, column_stride;
};

enum Weight : int { kNoWeight = -1, kPackedSigns = 3 };  // besides the dtype codes
enum Value : int { kOnes = 0, kMagnitude = 1, kRandom = 2 };

// F (rows, columns) = scale * value, with a weight scale * |value| * sign(weight). Rows of weight and magnitude are
// dense, and row_stride elements (words of packed signs) apart.
struct FeedbackMatrix {
  int64_t rows, columns;
  int weight_kind, value;
  const void *weight, *magnitude;
  int64_t weight_stride, magnitude_stride;
  int magnitude_dtype, law;
  const int64_t* state;  // seed, stream, step
  Range range;
  float scale;
  bool sign_plus;
};

// out (rows, columns); row r is row index[r] of the law where `index` is given.
int feedback_matrix(const FeedbackMatrix& f, const int64_t* index, void* out, int dtype, void* stream);

// out (m, columns) = grad (m, rows) F in float32 multiply-adds, F in registers. Scratch: splits * m * columns floats
// where there is more than one split.
int feedback_product_splits(const FeedbackMatrix& f, int64_t m);
int feedback_product(const FeedbackMatrix& f, const Operand& grad, int64_t m, void* out, int dtype, float* scratch,
                     void* stream);

// out (rows, ceil(columns / 32)): bit j % 32 of word j / 32 is set where the weight is below zero.
int feedback_pack_signs(const FeedbackMatrix& f, uint32_t* out, void* stream);

struct SgdStep {
  float lr, momentum, dampening, weight_decay, grad_scale;
  bool nesterov, manhattan;
};

// weight (n, k) and velocity (n, k; nullptr: no momentum) one step along grad^T x, grad (m, n), x (m, k); dense rows.
int feedback_sgd_update(const SgdStep& step, int64_t m, int64_t n, int64_t k, const Operand& grad, const Operand& x,
                        void* weight, int weight_dtype, int64_t weight_stride, void* velocity, int velocity_dtype,
                        int64_t velocity_stride, void* stream);

}  // namespace lgk
