// The CPU kernels of the family zeroth_order: what one instruction-set level offers.
// Formulas: lgkernels/ops/zeroth_order/reference.py.
#pragma once
#include <optional>

#include "common/cpu/level.h"
#include "common/formula.h"

namespace lgk::cpu {

// Matrices Z by formula, all of one law, and the numbers that they are taken times.
struct FormulaNoise {
  const int64_t* states;  // (count, 3): (seed, stream, step) of each matrix
  int64_t count;
  Law law;
  double scale;
  std::optional<double> low;
  const float* coefficients;

  Formula formula(int64_t i, int64_t rows, int64_t columns) const {
    const Range range = low ? range_from(*low, scale) : signed_range(scale);
    return {rows, columns, {}, {}, kRandom, law, states + 3 * (count > 1 ? i : 0), range, 1.f, false};
  }
};

struct Members {
  int64_t members, rows, outputs, inputs;
};

struct ZerothOrderKernels {
  // out (members, rows, outputs) = x[m] (W + c_m Z_m)^T, W and Z read and made once for all members; `rows` are few
  int (*product)(const FormulaNoise&, const Members&, const Matrix& weight, const Matrix& x, float* out, int threads);
  // out (members, count, inputs): rows [first, first + count) of W + c_m Z_m
  int (*perturbed)(const FormulaNoise&, const Members&, const Matrix& weight, int64_t first, int64_t count, float* out,
                   int threads);
  // W <- keep W + sum_i c_i Z_i in place, W (rows, columns)
  int (*update)(const FormulaNoise&, const Matrix& weight, int64_t rows, int64_t columns, float keep, int threads);
};

LGK_LEVELS(ZerothOrderKernels, zeroth_order)

}  // namespace lgk::cpu
