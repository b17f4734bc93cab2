#define LGK_ISA avx2
#include "equilibrium/cpu/table.h"
