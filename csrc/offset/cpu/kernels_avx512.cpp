#define LGK_ISA avx512
#include "offset/cpu/table.h"
