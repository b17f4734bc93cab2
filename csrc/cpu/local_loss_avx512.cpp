#define LGK_ISA avx512
#include "local_loss_kernels.h"
