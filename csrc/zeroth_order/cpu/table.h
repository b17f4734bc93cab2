// The table of one instruction-set level: include with LGK_ISA defined.
#include "zeroth_order/cpu/product.h"
#include "zeroth_order/cpu/update.h"

namespace lgk::cpu::LGK_ISA {

extern const ZerothOrderKernels zeroth_order = {perturbed_product, perturbed_rows, formula_update};

}  // namespace lgk::cpu::LGK_ISA
