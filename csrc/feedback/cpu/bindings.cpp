#include "common/cpu/bindings.h"
#include "common/formula_bindings.h"
#include "feedback/cpu/kernels.h"

LGK_TUPLE(lgk::cpu::Fold, 9)

namespace lgk::cpu {

static void bind(py::module_& m) {
  const FeedbackKernels& kernels = LGK_OF_LEVEL(feedback);
  define_kernel(m, "feedback_matrix", kernels.matrix);
  define_kernel(m, "feedback_product", kernels.product);
  define_kernel(m, "feedback_rows", kernels.rows);
  define_kernel(m, "feedback_fold", kernels.fold);
  define_kernel(m, "feedback_pack_signs", kernels.pack_signs);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
