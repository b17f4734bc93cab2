// The CPU kernels of the family fused_update: what one instruction-set level offers.
// Formulas: lgkernels/ops/fused_update/reference.py.
#pragma once
#include "common/cpu/level.h"
#include "common/formula.h"
#include "fused_update/options.h"

namespace lgk::cpu {

struct UpdateShape {
  int64_t rows, columns, batch;
};

struct FusedUpdateKernels {
  // weight and its states (or none), (rows, columns) of one dtype, a step along grad^T x (+ gradient, of any dtype, or
  // none), which is never stored; grad (batch, rows), x (batch, columns)
  int (*update)(const UpdateRule&, const UpdateShape&, const Matrix& weight, const Matrix& first, const Matrix& second,
                const Matrix& gradient, const Matrix& grad, const Matrix& x, int threads);
  // the same with states of 8 bits; second: none, or that of Adam
  int (*update_8bit)(const UpdateRule&, const UpdateShape&, const Matrix& weight, const CodedState& first,
                     const CodedState& second, const Matrix& gradient, const Matrix& grad, const Matrix& x,
                     int threads);
};

LGK_LEVELS(FusedUpdateKernels, fused_update)

}  // namespace lgk::cpu
