// What describes settling on both processors (lgkernels/ops/equilibrium/reference.py defines what it computes).
#pragma once
#include <cstdint>

namespace lgk {

enum class StateActivation : int { kSigmoid, kDsilu, kHardSigmoid, kClippedRelu };
enum class StateLoss : int { kCrossEntropy, kMse };
enum class StateSchedule : int { kSynchronous, kAsynchronous };
// Of all phases the states; of a tangent, or of a circle of nudges, the error of the activities.
enum class StateWanted : int { kStates, kTangent, kError };

struct Settling {
  StateActivation activation;
  StateLoss loss;
  StateSchedule schedule;
  int64_t steps;
  float tolerance;  // negative: none
};

// A net of dense layers, float32 and contiguous, on the processor of the kernels.
struct StateLayer {
  int64_t units;
  const float* drive;  // (samples, units), or null: 0
  const float* start;  // (rows, units); of an error (samples, units): the free state
  float* result;       // the same: the states, or the error
};

struct StateEdge {
  int source, target;
  const float* weight;  // (units of source, units of target)
};

// The force on the last layer. No goal: none; no weight: the activities are the logits.
struct StateReadout {
  int64_t classes;
  const float* weight;  // (units, classes)
  const float* bias;
  const float* goal;  // (samples, classes)
};

}  // namespace lgk
