#define LGK_ISA avx2
#include "local_loss_kernels.h"
