#define LGK_ISA avx512
#include "direct/cpu/table.h"
