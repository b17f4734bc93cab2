#include "common/cpu/bindings.h"
#include "equilibrium/cpu/kernels.h"
#include "equilibrium/options_bindings.h"

LGK_TUPLE(lgk::cpu::StatePhases, 6)
LGK_TUPLE(lgk::cpu::StateReport, 3)
LGK_WORDS(lgk::cpu::StatePool, "max", "softmax", "avg")
LGK_TUPLE(lgk::cpu::PooledEdge, 7)
LGK_TUPLE(lgk::cpu::PoolKept, 2)

namespace lgk::cpu {

static int settle_net(const std::vector<StateLayer>& layers, const std::vector<StateEdge>& edges,
                      const StateReadout& readout, const StatePhases& phases, const Settling& options,
                      const StateReport& report, int threads) {
  const StateNet net = {layers.data(), edges.data(), static_cast<int>(layers.size()), static_cast<int>(edges.size()),
                        readout};
  return LGK_OF_LEVEL(equilibrium).settle(net, phases, options, report, threads);
}

static int pack_pooled(const PooledEdge& edge, const float* weights, float* up, float* down, int threads) {
  return LGK_OF_LEVEL(equilibrium).pack_pooled(edge, weights, up, down, threads);
}

static int pooled_up(const PooledEdge& edge, const float* image, const float* panels, float* value,
                     const PoolKept& kept, float* points, int threads) {
  return LGK_OF_LEVEL(equilibrium).pooled_up(edge, image, panels, value, kept, points, threads);
}

static int pooled_down(const PooledEdge& edge, const float* value, const PoolKept& kept, const float* panels,
                       float* image, float* points, int threads) {
  return LGK_OF_LEVEL(equilibrium).pooled_down(edge, value, kept, panels, image, points, threads);
}

static void bind(py::module_& m) {
  define_kernel(m, "equilibrium_settle", settle_net);
  define_kernel(m, "equilibrium_pack_pooled", pack_pooled);
  define_kernel(m, "equilibrium_pooled_up", pooled_up);
  define_kernel(m, "equilibrium_pooled_down", pooled_down);
}

static const Registration registration(Processor::kCpu, bind);

}  // namespace lgk::cpu
