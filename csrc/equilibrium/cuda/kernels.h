// The CUDA entry point of the family equilibrium (lgkernels/ops/equilibrium/reference.py defines what it computes).
// Dense nets, float32, contiguous. Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing
// synchronises.
#pragma once
#include <cstdint>
#include <vector>

#include "equilibrium/options.h"

namespace lgk::cuda {

constexpr int kMostLayers = 8, kMostEdges = 16, kMostPhases = 16;

// The rows of a state: [phase][sample] of the real phases, then [phase][Re, Im][sample]. A tangent is one phase that is
// not real: the derivative by beta at 0 goes along. share: of an error, what r - phi(start) of a phase counts in it.
struct SettledPhases {
  int64_t samples, real_phases;
  std::vector<float> beta_real, beta_imag, share_real, share_imag;
  StateWanted wanted;
};

// residual, orbit (phases, samples); scratch (2, rows, units of all layers), of a tangent twice the samples' rows. It
// is used by more than one step, and by the sum of an error.
struct SettledReport {
  float *residual, *orbit, *scratch;
};

// options.steps steps; the tolerance is the caller's, who then takes step by step.
int equilibrium_settle(const std::vector<StateLayer>& layers, const std::vector<StateEdge>& edges,
                       const StateReadout& readout, const SettledPhases& phases, const Settling& options,
                       const SettledReport& report, void* stream);

}  // namespace lgk::cuda
