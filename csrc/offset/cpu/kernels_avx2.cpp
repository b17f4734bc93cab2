#define LGK_ISA avx2
#include "offset/cpu/table.h"
