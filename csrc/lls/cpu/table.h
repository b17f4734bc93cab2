// The table of one instruction-set level: include with LGK_ISA defined.
#include "lls/cpu/activation.h"
#include "lls/cpu/gradients.h"
#include "lls/cpu/head.h"
#include "lls/cpu/signs.h"
#include "lls/cpu/stats.h"

namespace lgk::cpu::LGK_ISA {

#ifdef __AVX512F__
constexpr bool kReadsSigns = true;
inline int head(const HeadOptions& options, const HeadInputs& inputs, const HeadOutputs& outputs, int threads) {
  const Head h{options, inputs, outputs};
  return h.signs ? run_head(h, SignProducts{h}, threads) : run_head(h, TableProducts{h}, threads);
}
#else
constexpr bool kReadsSigns = false;
inline int head(const HeadOptions& options, const HeadInputs& inputs, const HeadOutputs& outputs, int threads) {
  const Head h{options, inputs, outputs};
  return run_head(h, TableProducts{h}, threads);
}
#endif

extern const LlsKernels lls = {
    kReadsSigns,   latents,         expand_grad,        batch_stats,
    norm_act_pool, norm_grads,      grad_preactivation, linear_grad_preactivation,
    head,          modulation_grad, to_channels_last,
};

}  // namespace lgk::cpu::LGK_ISA
