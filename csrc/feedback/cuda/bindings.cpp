#include "common/formula_bindings.h"
#include "feedback/cuda/kernels.h"

LGK_TUPLE(lgk::StridedMatrix, 4)

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "feedback_matrix", &feedback_matrix);
  define(m, "feedback_product_splits", &feedback_product_splits);
  define(m, "feedback_product", &feedback_product);
  define(m, "feedback_pack_signs", &feedback_pack_signs);
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
