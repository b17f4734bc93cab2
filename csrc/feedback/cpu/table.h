// The table of one instruction-set level: include with LGK_ISA defined.
#include "common/cpu/formula_matrix.h"
#include "feedback/cpu/fold.h"
#include "feedback/cpu/product.h"

namespace lgk::cpu::LGK_ISA {

extern const FeedbackKernels feedback = {matrix, product, rows, fold, pack_signs};

}  // namespace lgk::cpu::LGK_ISA
