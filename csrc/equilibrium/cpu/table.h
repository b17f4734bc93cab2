// The table of one instruction-set level: include with LGK_ISA defined.
#include "equilibrium/cpu/settle.h"

namespace lgk::cpu::LGK_ISA {

extern const EquilibriumKernels equilibrium = {settle};

}  // namespace lgk::cpu::LGK_ISA
