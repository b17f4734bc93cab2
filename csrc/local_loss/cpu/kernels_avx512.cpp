#define LGK_ISA avx512
#include "local_loss/cpu/table.h"
