#define LGK_ISA base
#include "fused_update/cpu/table.h"
