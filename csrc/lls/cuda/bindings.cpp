#include "lls/cuda/kernels.h"
#include "lls/options_bindings.h"

LGK_TUPLE(lgk::cuda::Image, 8)
LGK_TUPLE(lgk::cuda::Rows, 4)
LGK_TUPLE(lgk::cuda::Finish, 5)
LGK_TUPLE(lgk::cuda::HeadShape, 6)
LGK_TUPLE(lgk::cuda::HeadInputs, 4)
LGK_TUPLE(lgk::cuda::HeadOutputs, 5)

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "lls_batch_stats_splits", &lls_batch_stats_splits);
  define(m, "lls_batch_stats", &lls_batch_stats);
  define(m, "lls_norm_act_pool", &lls_norm_act_pool);
  define(m, "lls_norm_grads", &lls_norm_grads);
  define(m, "lls_grad_preactivation", &lls_grad_preactivation);
  define(m, "lls_expand_grad", &lls_expand_grad);
  define(m, "lls_linear_norm_act_pool", &lls_linear_norm_act_pool);
  define(m, "lls_linear_grad_preactivation", &lls_linear_grad_preactivation);
  define(m, "lls_head_scratch", &lls_head_scratch);
  define(m, "lls_head", &lls_head);
  define(m, "lls_modulation_grad", &lls_modulation_grad);
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
