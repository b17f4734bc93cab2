#define LGK_ISA avx2
#include "zeroth_order/cpu/table.h"
