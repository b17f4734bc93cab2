#include "common/formula_bindings.h"
#include "fused_update/cuda/kernels.h"
#include "fused_update/options_bindings.h"

LGK_TUPLE(lgk::StridedMatrix, 4)
LGK_TUPLE(lgk::cuda::UpdateShape, 3)

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "fused_update", &fused_update);
  define(m, "fused_update_8bit", &fused_update_8bit);
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
