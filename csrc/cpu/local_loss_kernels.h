// The table of one instruction-set level: include with LGK_ISA defined.
#include "local_loss_heads.h"
#include "local_loss_maps.h"
#include "offset.h"

namespace lgk::LGK_ISA {

extern const LocalLossKernels local_loss = {moments, scale_shifted, logit_loss, goodness, offset_sgd};

}  // namespace lgk::LGK_ISA
