#define LGK_ISA base
#include "forward_gradient/cpu/table.h"
