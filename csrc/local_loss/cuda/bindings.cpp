#include "common/bindings.h"
#include "local_loss/cuda/kernels.h"

LGK_TUPLE(lgk::cuda::Planes, 4)

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "local_loss_moments", &local_loss_moments);
  define(m, "local_loss_goodness_splits", &local_loss_goodness_splits);
  define(m, "local_loss_goodness", &local_loss_goodness);
  define(m, "local_loss_scale", &local_loss_scale);
  define(m, "local_loss_cross_entropy", &local_loss_cross_entropy);
  define(m, "local_loss_normalize_rows", &local_loss_normalize_rows);
  define(m, "local_loss_match_rows", &local_loss_match_rows);
  define(m, "local_loss_rows_grad", &local_loss_rows_grad);
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
