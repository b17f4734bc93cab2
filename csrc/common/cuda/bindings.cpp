#include "common/bindings.h"
#include "common/cuda/probe.h"

namespace lgk::cuda {

static void bind(py::module_& m) {
  define(m, "cuda_error_string", &status_string);
  define(m, "cuda_runtime_version", &runtime_version, "e.g. 13000; 0 where the kernels run on the CPU executor");
  define(m, "cuda_driver_version", &driver_version, "newest runtime that the driver supports; 0 without a driver");
  define(m, "cuda_device_status", &device_status,
         "0, or the error that these kernels meet on the device of that number");
  define(m, "cuda_architectures", &architectures, "what the kernels were compiled for, e.g. [800, 860]");
}

static const Registration registration(Processor::kCuda, bind);

}  // namespace lgk::cuda
