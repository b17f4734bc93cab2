// Matrices and feedback matrices by a formula as arguments of entries, for both processors.
#pragma once
#include <optional>

#include "common/bindings.h"
#include "common/formula.h"

namespace lgk {

// What a Formula comes as.
struct FormulaArguments {
  int64_t rows, columns;
  Matrix weight, magnitude;
  const int64_t* state;
  Law law;
  double law_scale;
  std::optional<double> low;
  float scale;
  bool sign_plus;

  Formula formula() const {
    const Value value = magnitude.dtype != kNoMatrix ? kMagnitude : state ? kRandom : kOnes;
    const Range range = low ? range_from(*low, law_scale) : signed_range(law_scale);
    return {rows, columns, weight, magnitude, value, law, value == kRandom ? state : nullptr, range, scale, sign_plus};
  }
};

}  // namespace lgk

LGK_WORDS(lgk::Law, "uniform", "normal", "uniform8", "sign")
LGK_TUPLE(lgk::Matrix, 3)
LGK_TUPLE(lgk::FormulaArguments, 10)

template <>
struct pybind11::detail::type_caster<lgk::Formula> {
  PYBIND11_TYPE_CASTER(lgk::Formula, const_name("formula"));

  bool load(handle source, bool convert) {
    make_caster<lgk::FormulaArguments> arguments;
    if (!arguments.load(source, convert)) return false;
    value = cast_op<lgk::FormulaArguments&>(arguments).formula();
    return true;
  }
};
