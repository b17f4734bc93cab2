#define LGK_ISA avx2
#include "fused_update/cpu/table.h"
