// The table of one instruction-set level: include with LGK_ISA defined.
#include "fused_update/cpu/update_8bit.h"

namespace lgk::cpu::LGK_ISA {

extern const FusedUpdateKernels fused_update = {update, update_8bit};

}  // namespace lgk::cpu::LGK_ISA
