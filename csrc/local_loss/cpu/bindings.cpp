#include "common/cpu/bindings.h"
#include "local_loss/cpu/kernels.h"

LGK_TUPLE(lgk::cpu::FeatureMap, 7)
LGK_TUPLE(lgk::cpu::Goodness, 10)
LGK_TUPLE(lgk::cpu::LogitInputs, 8)
LGK_TUPLE(lgk::cpu::LogitOutputs, 4)

namespace lgk::cpu {

static void bind(py::module_& m) {
  const LocalLossKernels& kernels = LGK_OF_LEVEL(local_loss);
  define_kernel(m, "local_moments", kernels.moments);
  define_kernel(m, "local_scale_shifted", kernels.scale_shifted);
  define_kernel(m, "local_logit_loss", kernels.logit_loss);
  define_kernel(m, "local_goodness", kernels.goodness);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
