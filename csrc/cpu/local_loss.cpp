// The kernels at the compiler's baseline, and the choice between the levels.
#define LGK_ISA base
#include "local_loss_kernels.h"

#include <string>

namespace lgk {

const LocalLossKernels& local_loss_kernels() {
#if LGK_X86_LEVELS
  const std::string level = lls_kernels().level;
  if (level == "avx512") return avx512::local_loss;
  if (level == "avx2") return avx2::local_loss;
#endif
  return base::local_loss;
}

}  // namespace lgk
