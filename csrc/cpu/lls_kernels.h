// The table of one instruction-set level: include with LGK_ISA and LGK_LEVEL defined.
#include "lls_activation.h"
#include "lls_gradients.h"
#include "lls_head.h"
#include "lls_signs.h"
#include "lls_stats.h"

namespace lgk::LGK_ISA {

#ifdef __AVX512F__
constexpr bool kPackedSigns = true;
inline int head(const Head& h, int threads) {
  return h.signs ? run_head(h, SignProducts{h}, threads) : run_head(h, TableProducts{h}, threads);
}
#else
constexpr bool kPackedSigns = false;
inline int head(const Head& h, int threads) { return run_head(h, TableProducts{h}, threads); }
#endif

extern const LlsKernels kernels = {
    LGK_LEVEL,   kPackedSigns,       latents,
    expand_grad, batch_stats,        norm_act_pool,
    norm_grads,  grad_preactivation, linear_grad_preactivation,
    head,        modulation_grad,    to_channels_last,
};

}  // namespace lgk::LGK_ISA
