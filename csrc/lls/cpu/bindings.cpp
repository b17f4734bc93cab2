#include "common/cpu/bindings.h"
#include "lls/cpu/bins.h"
#include "lls/cpu/kernels.h"
#include "lls/cpu/sign_layouts.h"
#include "lls/options_bindings.h"

LGK_TUPLE(lgk::cpu::Activation, 7)
LGK_TUPLE(lgk::cpu::HeadInputs, 10)
LGK_TUPLE(lgk::cpu::HeadOutputs, 4)

namespace lgk::cpu {

// A kernel that pools: after the activation come the numbers of bins along its rows and columns.
template <class... A>
static void define_pooling(py::module_& m, const char* name,
                           int (*kernel)(const Activation&, const Axis&, const Axis&, A...)) {
  m.def(
      name,
      [kernel](const Activation& a, int64_t pool_rows, int64_t pool_columns, typename Loaded<A>::type... arguments) {
        const Bins rows(a.height, pool_rows), columns(a.width, pool_columns);
        raise_for(kernel(a, rows.axis, columns.axis, arguments...));
      },
      Release());
}

static void bind(py::module_& m) {
  const LlsKernels& kernels = LGK_OF_LEVEL(lls);
  m.def("lls_packed_signs", [signs = kernels.packed_signs] { return signs; });
  define(m, "lls_sign_layouts_size", &sign_layouts_size);
  define(m, "lls_sign_layouts", &sign_layouts);
  define_kernel(m, "lls_to_channels_last", kernels.to_channels_last);
  define_pooling(m, "lls_latents", kernels.latents);
  define_pooling(m, "lls_expand_grad", kernels.expand_grad);
  define_kernel(m, "lls_batch_stats", kernels.batch_stats);
  define_pooling(m, "lls_norm_act_pool", kernels.norm_act_pool);
  define_kernel(m, "lls_norm_grads", kernels.norm_grads);
  define_pooling(m, "lls_grad_preactivation", kernels.grad_preactivation);
  define_kernel(m, "lls_linear_grad_preactivation", kernels.linear_grad_preactivation);
  define_kernel(m, "lls_head", kernels.head);
  define_kernel(m, "lls_modulation_grad", kernels.modulation_grad);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
