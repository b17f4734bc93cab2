// The CPU kernels of the family feedback: what one instruction-set level offers.
// Formulas: lgkernels/ops/feedback/reference.py.
#pragma once
#include "common/cpu/level.h"
#include "common/formula.h"

namespace lgk::cpu {

// The adjoint of a convolution's windows: columns (batch, positions, channels, kernel) summed into maps (batch,
// channels, height, width). Pairs are of rows and columns.
struct Fold {
  int64_t batch, channels, height, width;
  int64_t kernel[2], positions[2], stride[2], padding[2], dilation[2];
};

struct FeedbackKernels {
  // the formula's rows and columns from (row, column) on
  int (*matrix)(const Formula&, int64_t row, int64_t column, void* out, int dtype, int threads);
  int (*product)(const Formula&, const Matrix& grad, int64_t batch, void* out, int dtype, int threads);
  int (*rows)(const Formula&, const int64_t* index, int64_t count, void* out, int dtype, int threads);
  int (*fold)(const Fold&, const float* columns, float* out, int threads);
  int (*pack_signs)(const Matrix& weight, int64_t rows, int64_t columns, uint32_t* out, int threads);
};

LGK_LEVELS(FeedbackKernels, feedback)

}  // namespace lgk::cpu
