// Noise by formula and sizes, as the kernels of both processors take them.
#pragma once
#include <optional>

#include "common/formula.h"

namespace lgk {

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

}  // namespace lgk
