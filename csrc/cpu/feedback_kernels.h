// The table of one instruction-set level: include with LGK_ISA defined.
#include "feedback_block.h"
#include "feedback_fold.h"
#include "feedback_matrix.h"
#include "feedback_product.h"
#include "feedback_update.h"

namespace lgk::LGK_ISA {

extern const FeedbackKernels feedback = {matrix,     product,    rows,           fold,
                                         pack_signs, sgd_update, direct_forward, direct_backward};

}  // namespace lgk::LGK_ISA
