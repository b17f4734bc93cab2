#define LGK_ISA avx512
#include "equilibrium/cpu/table.h"
