// The module lgkernels._C: the submodules cpu and cuda, filled by what registered itself.
#include "common/bindings.h"

PYBIND11_MODULE(_C, m) {
  using namespace lgk;
  m.doc() = "Native kernels of lgkernels. Not a public interface: call lgkernels.functional.";
  m.attr("version") = LGK_VERSION;
  m.attr("has_cuda") = !binders(Processor::kCuda).empty();
  py::module_ cpu = m.def_submodule("cpu"), cuda = m.def_submodule("cuda");
  for (Binder bind : binders(Processor::kCpu)) bind(cpu);
  for (Binder bind : binders(Processor::kCuda)) bind(cuda);
  m.attr("cpu_level") = cpu.attr("cpu_level");
}
