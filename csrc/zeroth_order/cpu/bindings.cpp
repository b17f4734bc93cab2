#include "common/cpu/bindings.h"
#include "common/formula_bindings.h"
#include "zeroth_order/cpu/kernels.h"

LGK_TUPLE(lgk::FormulaNoise, 6)
LGK_TUPLE(lgk::Members, 4)

namespace lgk::cpu {

static void bind(py::module_& m) {
  const ZerothOrderKernels& kernels = LGK_OF_LEVEL(zeroth_order);
  define_kernel(m, "zeroth_order_product", kernels.product);
  define_kernel(m, "zeroth_order_perturbed", kernels.perturbed);
  define_kernel(m, "zeroth_order_update", kernels.update);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
