#define LGK_ISA base
#include "equilibrium/cpu/table.h"
