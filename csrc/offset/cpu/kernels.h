// The CPU kernels of the family offset: what one instruction-set level offers.
// Formulas: lgkernels/ops/offset/reference.py.
#pragma once
#include "common/cpu/level.h"
#include "offset/options.h"

namespace lgk::cpu {

struct OffsetKernels {
  int (*offset_sgd)(const OffsetOptions&, const OffsetTensor*, int64_t count, int threads);
};

LGK_LEVELS(OffsetKernels, offset)

}  // namespace lgk::cpu
