#define LGK_ISA avx2
#include "forward_gradient/cpu/table.h"
