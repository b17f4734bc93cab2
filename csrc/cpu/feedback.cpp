// The kernels at the compiler's baseline, and the choice between the levels.
#define LGK_ISA base
#include "feedback_kernels.h"

#include <string>

#include "lgk/lls_cpu.h"

namespace lgk {

const FeedbackKernels& feedback_kernels() {
#if LGK_X86_LEVELS
  const std::string level = lls_kernels().level;
  if (level == "avx512") return avx512::feedback;
  if (level == "avx2") return avx2::feedback;
#endif
  return base::feedback;
}

}  // namespace lgk
