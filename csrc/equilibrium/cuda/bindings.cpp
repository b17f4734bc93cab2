#include "equilibrium/cuda/kernels.h"
#include "equilibrium/options_bindings.h"

LGK_TUPLE(lgk::cuda::SettledPhases, 7)
LGK_TUPLE(lgk::cuda::SettledReport, 3)

namespace lgk::cuda {

static void bind(py::module_& m) { define(m, "equilibrium_settle", &equilibrium_settle); }

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
