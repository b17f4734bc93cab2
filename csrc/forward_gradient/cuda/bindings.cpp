#include "common/formula_bindings.h"
#include "forward_gradient/cuda/kernels.h"

LGK_TUPLE(lgk::cuda::Array, 2)
LGK_TUPLE(lgk::cuda::Features, 4)
LGK_TUPLE(lgk::cuda::Layer, 7)

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "forward_gradient_pooled", &forward_gradient_pooled);
  define(m, "forward_gradient_head", &forward_gradient_head);
  define(m, "forward_gradient_softmax", &forward_gradient_softmax);
  define(m, "forward_gradient_tangent", &forward_gradient_tangent);
  define(m, "forward_gradient_cotangent", &forward_gradient_cotangent);
  define(m, "forward_gradient_dual_norm", &forward_gradient_dual_norm);
  define(m, "forward_gradient_activity_grad", &forward_gradient_activity_grad);
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
