// The table of one instruction-set level: include with LGK_ISA defined.
#include "local_loss/cpu/heads.h"
#include "local_loss/cpu/maps.h"

namespace lgk::cpu::LGK_ISA {

extern const LocalLossKernels local_loss = {moments, scale_shifted, logit_loss, goodness};

}  // namespace lgk::cpu::LGK_ISA
