#define LGK_ISA base
#include "offset/cpu/table.h"
