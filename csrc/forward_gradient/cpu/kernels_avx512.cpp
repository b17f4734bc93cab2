#define LGK_ISA avx512
#include "forward_gradient/cpu/table.h"
