// The kernels at the compiler's baseline, and the choice between the levels.
#define LGK_ISA base
#define LGK_LEVEL "default"
#include "lls_kernels.h"

#include <string>

namespace lgk {

static const LlsKernels& choose() {
  const char* asked = std::getenv("LGKERNELS_CPU");
  const std::string level = asked ? asked : "";
  if (level == "default") return base::kernels;
#if LGK_X86_LEVELS
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && level != "avx2") return avx512::kernels;
  if (has_avx2) return avx2::kernels;
#endif
  return base::kernels;
}

const LlsKernels& lls_kernels() {
  static const LlsKernels& chosen = choose();
  return chosen;
}

}  // namespace lgk
