#define LGK_ISA avx2
#include "lls/cpu/table.h"
