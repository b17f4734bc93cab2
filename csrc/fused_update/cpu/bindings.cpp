#include "common/cpu/bindings.h"
#include "common/formula_bindings.h"
#include "fused_update/cpu/kernels.h"
#include "fused_update/options_bindings.h"

LGK_TUPLE(lgk::cpu::UpdateShape, 3)

namespace lgk::cpu {

static void bind(py::module_& m) {
  define_kernel(m, "fused_update", LGK_OF_LEVEL(fused_update).update);
  define_kernel(m, "fused_update_8bit", LGK_OF_LEVEL(fused_update).update_8bit);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
