// The table of one instruction-set level: include with LGK_ISA defined.
#include "equilibrium/cpu/pooled.h"
#include "equilibrium/cpu/settle.h"

namespace lgk::cpu::LGK_ISA {

extern const EquilibriumKernels equilibrium = {settle, pack_pooled, pooled_up, pooled_down};

}  // namespace lgk::cpu::LGK_ISA
