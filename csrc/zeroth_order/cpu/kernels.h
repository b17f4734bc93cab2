// The CPU kernels of the family zeroth_order: what one instruction-set level offers.
// Formulas: lgkernels/ops/zeroth_order/reference.py.
#pragma once
#include "common/cpu/level.h"
#include "zeroth_order/noise.h"

namespace lgk::cpu {

struct ZerothOrderKernels {
  // out (members, rows, outputs) = x[m] (W + c_m Z_m)^T, W and Z read and made once for all members; `rows` are few
  int (*product)(const FormulaNoise&, const Members&, const Matrix& weight, const Matrix& x, float* out, int threads);
  // out (members, rows, inputs): rows of W + c_m Z_m, `outputs` of which there are; row r is index[m, r], or first + r
  // where there is no index
  int (*perturbed)(const FormulaNoise&, const Members&, const Matrix& weight, const int64_t* index, int64_t first,
                   float* out, int threads);
  // W <- keep W + sum_i c_i Z_i in place, W (rows, columns)
  int (*update)(const FormulaNoise&, const Matrix& weight, int64_t rows, int64_t columns, float keep, int threads);
};

LGK_LEVELS(ZerothOrderKernels, zeroth_order)

}  // namespace lgk::cpu
