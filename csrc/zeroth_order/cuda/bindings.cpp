#include "common/formula_bindings.h"
#include "zeroth_order/cuda/kernels.h"

LGK_TUPLE(lgk::FormulaNoise, 6)
LGK_TUPLE(lgk::Members, 4)

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "zeroth_order_product", &zeroth_order_product);
  define(m, "zeroth_order_rows", &zeroth_order_rows);
  define(m, "zeroth_order_update", &zeroth_order_update);
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
