#define LGK_ISA avx2
#include "feedback_kernels.h"
