// The CPU kernels of the family equilibrium: what one instruction-set level offers. Dense nets, float32, contiguous.
// Formulas: lgkernels/ops/equilibrium/reference.py and field.py.
#pragma once
#include "common/cpu/level.h"
#include "equilibrium/options.h"

namespace lgk::cpu {

// The rows of a state: [phase][sample] of the real phases, then [phase][Re, Im][sample]. A tangent is one phase that is
// not real: the derivative by beta at 0 goes along.
struct StatePhases {
  int64_t samples, phases, real_phases;
  const float *beta, *share;  // (phases, Re and Im); of an error, what r - phi(start) counts in it: Re r a + Im r b
  StateWanted wanted;
};

struct StateReport {  // (phases, samples)
  int64_t* steps;
  float *residual, *orbit;
};

struct StateNet {
  const StateLayer* layers;
  const StateEdge* edges;
  int layer_count, edge_count;
  StateReadout readout;
};

enum class StatePool : int { kMax, kSoftmax, kMean };

// A 3x3 convolution of stride 1 from a layer of `low` channels and height x width pixels to one of `high` channels, and
// a 2x2 pool. Channels are multiples of 16.
struct PooledEdge {
  int64_t samples, height, width, low, high, padding;
  StatePool pool;
};

// What a pool's derivative is made of: the place of the maximum (windows, high), or the slopes of a softmax pool
// (windows, 4, high); the other is null, of a mean both are.
struct PoolKept {
  int32_t* place;
  float* slopes;
};

struct EquilibriumKernels {
  int (*settle)(const StateNet&, const StatePhases&, const Settling&, const StateReport&, int threads);
  // weights (points, low, high), transformed -> panels; 9 points of a mean, 16 of the others
  int (*pack_pooled)(const PooledEdge&, const float* weights, float* up, float* down, int threads);
  // points: room for (points, windows, low) and (points, windows, high)
  int (*pooled_up)(const PooledEdge&, const float* image, const float* panels, float* value, const PoolKept&,
                   float* points, int threads);
  int (*pooled_down)(const PooledEdge&, const float* value, const PoolKept&, const float* panels, float* image,
                     float* points, int threads);
};

LGK_LEVELS(EquilibriumKernels, equilibrium)

}  // namespace lgk::cpu
