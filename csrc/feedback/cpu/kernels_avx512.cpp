#define LGK_ISA avx512
#include "feedback/cpu/table.h"
