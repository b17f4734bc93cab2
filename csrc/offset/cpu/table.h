// The table of one instruction-set level: include with LGK_ISA defined.
#include "offset/cpu/step.h"

namespace lgk::cpu::LGK_ISA {

extern const OffsetKernels offset = {offset_sgd};

}  // namespace lgk::cpu::LGK_ISA
