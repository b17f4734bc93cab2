#define LGK_ISA avx512
#include "fused_update/cpu/table.h"
