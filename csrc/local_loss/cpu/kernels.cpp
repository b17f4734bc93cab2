#define LGK_ISA base
#include "local_loss/cpu/table.h"
