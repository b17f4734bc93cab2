// The table of one instruction-set level: include with LGK_ISA defined.
#include "direct/cpu/block.h"

namespace lgk::cpu::LGK_ISA {

extern const DirectKernels direct = {direct_forward, direct_backward};

}  // namespace lgk::cpu::LGK_ISA
