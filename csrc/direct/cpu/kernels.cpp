#define LGK_ISA base
#include "direct/cpu/table.h"
