// The step of one weight, and where its tensors lie, for the kernels of this folder.
#pragma once
#include "common/cuda/formula.h"
#include "fused_update/options.h"

namespace lgk::cuda {

struct Decay {  // of the second state
  float beta2, fresh2;
};

// The new weight; the states m and v are updated where there are any.
LGK_DEVICE float step_of(const UpdateRule& s, const Decay& d, float sum, float weight, bool first, float& m, float& v) {
  float g = sum * s.grad_scale;
  g = g > s.clip_value ? s.clip_value : g < -s.clip_value ? -s.clip_value : g;  // NaN stays
  if (s.rule == kManhattan) g = static_cast<float>((g > 0.0f) - (g < 0.0f));
  g = fmaf(s.weight_decay, weight, g);
  float step = g;
  if (first) {
    m = fmaf(s.momentum, m, s.fresh * g);
    step = s.nesterov ? fmaf(s.momentum, m, g) : m;
  }
  if (s.rule == kAdam) {
    v = fmaf(d.beta2, v, d.fresh2 * g * g);
    step = m / (sqrtf(v) / s.root + s.eps);
  }
  return fmaf(-s.lr, step, s.keep * weight);
}

LGK_DEVICE RowReader reader_of(const Matrix& matrix, int64_t row, int64_t column, int64_t columns) {
  return row_reader(matrix.data, matrix.dtype, matrix.stride, row, column, columns);
}

}  // namespace lgk::cuda
