#define LGK_ISA base
#include "zeroth_order/cpu/table.h"
