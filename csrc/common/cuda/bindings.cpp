#include "common/bindings.h"
#include "common/cuda/launch.h"

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "cuda_error_string", &status_string);
  define(m, "cuda_runtime_version", &runtime_version, "e.g. 13000; 0 where the kernels run on the CPU executor");
  define(m, "cuda_driver_version", &driver_version, "newest runtime that the driver supports; 0 without a driver");
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
