#define LGK_ISA avx512
#include "lls/cpu/table.h"
