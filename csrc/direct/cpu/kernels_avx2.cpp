#define LGK_ISA avx2
#include "direct/cpu/table.h"
