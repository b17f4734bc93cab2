// The CUDA entry point of the family fused_update (lgkernels/ops/fused_update/reference.py defines what it computes).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include "common/formula.h"
#include "fused_update/options.h"

namespace lgk::cuda {

struct UpdateShape {
  int64_t rows, columns, batch;
};

// weight and its states (or none), (rows, columns), one step along grad^T x (+ gradient, or none); grad (batch, rows),
// x (batch, columns).
int fused_update(const UpdateRule& rule, const UpdateShape& shape, const Matrix& weight, const Matrix& first,
                 const Matrix& second, const Matrix& gradient, const StridedMatrix& grad, const StridedMatrix& x,
                 void* stream);

// The same with states of 8 bits; second: none, or that of Adam.
int fused_update_8bit(const UpdateRule& rule, const UpdateShape& shape, const Matrix& weight, const CodedState& first,
                      const CodedState& second, const Matrix& gradient, const StridedMatrix& grad,
                      const StridedMatrix& x, void* stream);

}  // namespace lgk::cuda
