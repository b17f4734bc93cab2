#define LGK_ISA avx512
#include "zeroth_order/cpu/table.h"
