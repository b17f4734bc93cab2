#include "common/cpu/bindings.h"

static const lgk::Registration registration(lgk::Processor::kCpu, [](lgk::py::module_& m) {
  lgk::define(m, "cpu_level", &lgk::cpu::level_name,
              "Instruction set of the CPU kernels: default, avx2 or avx512 (LGKERNELS_CPU chooses a lower one).");
});
