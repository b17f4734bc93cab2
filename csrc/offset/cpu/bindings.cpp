#include "common/cpu/bindings.h"
#include "offset/cpu/kernels.h"

LGK_TUPLE(lgk::OffsetOptions, 5)

namespace lgk::cpu {

static_assert(sizeof(OffsetTensor) == 6 * sizeof(int64_t), "Python makes the table: (count, 6) int64");

static void bind(py::module_& m) { define_kernel(m, "offset_sgd", LGK_OF_LEVEL(offset).offset_sgd); }

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
