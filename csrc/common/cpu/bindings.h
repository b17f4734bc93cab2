// Entries of lgkernels._C.cpu.
#pragma once
#include <stdexcept>

#include "common/bindings.h"
#include "common/cpu/level.h"

namespace lgk::cpu {

inline void raise_for(int status) {
  if (status != 0) throw std::runtime_error(std::string("lgkernels CPU kernel: ") + status_message(status));
}

// Defines `name` as a kernel, whose status is raised unless it is 0. Other threads of Python run meanwhile.
template <class... A>
void define_kernel(py::module_& m, const char* name, int (*kernel)(A...)) {
  m.def(name, [kernel](typename Loaded<A>::type... arguments) { raise_for(kernel(arguments...)); }, Release());
}

}  // namespace lgk::cpu
