#define LGK_ISA avx2
#include "feedback/cpu/table.h"
