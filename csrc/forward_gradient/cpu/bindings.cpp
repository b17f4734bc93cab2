#include "common/cpu/bindings.h"
#include "common/formula_bindings.h"
#include "forward_gradient/cpu/kernels.h"

LGK_TUPLE(lgk::cpu::Array, 2)
LGK_TUPLE(lgk::cpu::FeatureShape, 4)
LGK_TUPLE(lgk::cpu::NormShape, 6)

namespace lgk::cpu {

static void bind(py::module_& m) {
  const ForwardGradientKernels& kernels = LGK_OF_LEVEL(forward_gradient);
  define_kernel(m, "forward_gradient_pooled", kernels.pooled);
  define_kernel(m, "forward_gradient_softmax", kernels.softmax);
  define_kernel(m, "forward_gradient_tangent", kernels.tangent);
  define_kernel(m, "forward_gradient_cotangent", kernels.cotangent);
  define_kernel(m, "forward_gradient_dual_norm", kernels.dual_norm);
  define_kernel(m, "forward_gradient_activity_grad", kernels.activity_grad);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
