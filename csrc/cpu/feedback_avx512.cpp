#define LGK_ISA avx512
#include "feedback_kernels.h"
