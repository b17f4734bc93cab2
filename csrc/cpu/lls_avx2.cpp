#define LGK_ISA avx2
#define LGK_LEVEL "avx2"
#include "lls_kernels.h"
