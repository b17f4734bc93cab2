// The bins of adaptive pooling.
#pragma once
#include <vector>

#include "lls/cpu/kernels.h"

namespace lgk::cpu {

// Makes the arrays behind an Axis and owns them. Not for kernels: a std::vector's functions compiled for wide
// instructions could be linked into code of another level.
struct Bins {
  std::vector<int64_t> bound, first, last, low, high;
  std::vector<float> inverse;
  Axis axis;

  Bins(int64_t size, int64_t pool);
};

}  // namespace lgk::cpu
