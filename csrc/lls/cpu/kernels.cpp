#define LGK_ISA base
#include "lls/cpu/table.h"
