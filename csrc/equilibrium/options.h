// What describes settling on both processors (lgkernels/ops/equilibrium/reference.py defines what it computes).
#pragma once
#include <cstdint>

namespace lgk {

enum class StateActivation : int { kSigmoid, kDsilu, kHardSigmoid, kClippedRelu };
enum class StateLoss : int { kCrossEntropy, kMse };
enum class StateSchedule : int { kSynchronous, kAsynchronous };

struct Settling {
  StateActivation activation;
  StateLoss loss;
  StateSchedule schedule;
  int64_t steps;
  float tolerance;  // negative: none
};

}  // namespace lgk
