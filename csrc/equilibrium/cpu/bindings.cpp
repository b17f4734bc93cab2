#include "common/cpu/bindings.h"
#include "equilibrium/cpu/kernels.h"

LGK_WORDS(lgk::StateActivation, "sigmoid", "dsilu", "hard_sigmoid", "clipped_relu")
LGK_WORDS(lgk::StateLoss, "cross_entropy", "mse")
LGK_WORDS(lgk::StateSchedule, "synchronous", "asynchronous")
LGK_TUPLE(lgk::Settling, 5)
LGK_TUPLE(lgk::cpu::StateLayer, 4)
LGK_TUPLE(lgk::cpu::StateEdge, 3)
LGK_TUPLE(lgk::cpu::StateReadout, 4)
LGK_TUPLE(lgk::cpu::StatePhases, 5)
LGK_TUPLE(lgk::cpu::StateReport, 3)

namespace lgk::cpu {

static int settle_net(const std::vector<StateLayer>& layers, const std::vector<StateEdge>& edges,
                      const StateReadout& readout, const StatePhases& phases, const Settling& options,
                      const StateReport& report, int threads) {
  const StateNet net = {layers.data(), edges.data(), static_cast<int>(layers.size()), static_cast<int>(edges.size()),
                        readout};
  return LGK_OF_LEVEL(equilibrium).settle(net, phases, options, report, threads);
}

static void bind(py::module_& m) { define_kernel(m, "equilibrium_settle", settle_net); }

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
