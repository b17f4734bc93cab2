#include "common/cpu/level.h"

#include <cstdlib>
#include <string>

namespace lgk::cpu {

static Level choose() {
  const char* asked = std::getenv("LGKERNELS_CPU");
  const std::string level = asked ? asked : "";
  if (level == "default") return kDefault;
#if LGK_X86_LEVELS
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && level != "avx2") return kAvx512;
  if (has_avx2) return kAvx2;
#endif
  return kDefault;
}

Level level() {
  static const Level chosen = choose();
  return chosen;
}

const char* level_name() {
  static const char* const names[] = {"default", "avx2", "avx512"};
  return names[level()];
}

const char* status_message(int status) {
  switch (status) {
    case 0: return "ok";
    case 1: return "out of memory";
    case 2: return "unknown dtype code";
    default: return "unknown status";
  }
}

}  // namespace lgk::cpu
