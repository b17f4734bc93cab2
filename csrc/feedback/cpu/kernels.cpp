#define LGK_ISA base
#include "feedback/cpu/table.h"
