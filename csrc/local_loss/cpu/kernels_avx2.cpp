#define LGK_ISA avx2
#include "local_loss/cpu/table.h"
