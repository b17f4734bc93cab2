// The table of one instruction-set level: include with LGK_ISA defined.
#include "forward_gradient/cpu/dual.h"
#include "forward_gradient/cpu/losses.h"

namespace lgk::cpu::LGK_ISA {

extern const ForwardGradientKernels forward_gradient = {pooled, softmax, tangent, cotangent, dual_norm, activity_grad};

}  // namespace lgk::cpu::LGK_ISA
