#include "common/cpu/bindings.h"
#include "common/formula_bindings.h"
#include "direct/cpu/kernels.h"

LGK_TUPLE(lgk::cpu::DirectBlock, 11)

namespace lgk::cpu {

static void bind(py::module_& m) {
  const DirectKernels& kernels = LGK_OF_LEVEL(direct);
  define_kernel(m, "direct_forward", kernels.direct_forward);
  define_kernel(m, "direct_backward", kernels.direct_backward);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
