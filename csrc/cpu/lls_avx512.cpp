#define LGK_ISA avx512
#define LGK_LEVEL "avx512"
#include "lls_kernels.h"
