// The instruction-set levels of the CPU kernels. A family's kernels are compiled once for each of them, by files that
// end in _avx2.cpp and _avx512.cpp, in a namespace of the level's own. What they offer is one table of functions a
// level, declared by LGK_LEVELS; LGK_OF_LEVEL is the table of the level chosen.
//
// Each function returns a status (0: ok) and takes raw pointers.
#pragma once

namespace lgk::cpu {

enum Level : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

// Chosen by cpuid, or by LGKERNELS_CPU=default|avx2|avx512 where this machine can run it.
Level level();
const char* level_name();

const char* status_message(int status);

}  // namespace lgk::cpu

#define LGK_LEVELS(Table, name) \
  namespace base {              \
  extern const Table name;      \
  }                             \
  namespace avx2 {              \
  extern const Table name;      \
  }                             \
  namespace avx512 {            \
  extern const Table name;      \
  }

#if LGK_X86_LEVELS
#define LGK_OF_LEVEL(name)                               \
  (lgk::cpu::level() == lgk::cpu::kAvx512 ? avx512::name \
   : lgk::cpu::level() == lgk::cpu::kAvx2 ? avx2::name   \
                                          : base::name)
#else
#define LGK_OF_LEVEL(name) base::name
#endif
