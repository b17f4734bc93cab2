#include "common/bindings.h"
#include "offset/cuda/kernels.h"

LGK_TUPLE(lgk::OffsetOptions, 5)
LGK_TUPLE(lgk::OffsetTensor, 6)

namespace lgk::cuda {

static void bind(py::module_& m) {
  m.def(
      "offset_sgd",
      [](const OffsetOptions& options, const std::vector<OffsetTensor>& tensors, Pointer<void> stream) {
        return offset_sgd(options, tensors.data(), static_cast<int64_t>(tensors.size()), stream);
      },
      Release());
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
