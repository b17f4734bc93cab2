// Cross entropy of one row of logits.
#pragma once
#include <cmath>

#include "common/cpu/simd.h"

namespace lgk::cpu::LGK_ISA {

// Loss of logits v against q, which is 1 - label_smoothing at the target and label_smoothing spread over all classes;
// grad = softmax(v) - q.
inline double cross_entropy(int64_t classes, float label_smoothing, const float* v, int64_t target, float* grad) {
  float highest = v[0];
  for (int64_t c = 1; c < classes; ++c) highest = v[c] > highest || v[c] != v[c] ? v[c] : highest;
  vf mass = {}, shifted_sum = {};
  for (int64_t c = 0; c < classes; c += V) {
    const int64_t n = smaller(V, classes - c);
    const vf shifted = first(load_some(v + c, n) - highest, n), e = first(exp_negative(shifted), n);
    store_some(grad + c, e, n);
    mass += e;
    shifted_sum += shifted;
  }
  const float partition = sum(mass), even = label_smoothing / static_cast<float>(classes);
  const double log_partition = std::log(static_cast<double>(partition));
  const double correct = static_cast<double>(v[target]) - highest;
  double loss = -(1.0 - label_smoothing) * (correct - log_partition);
  if (label_smoothing != 0) loss -= label_smoothing * (sum(shifted_sum) / static_cast<double>(classes) - log_partition);
  const float scale = 1 / partition;
  for (int64_t c = 0; c < classes; c += V) {
    const int64_t n = smaller(V, classes - c);
    store_some(grad + c, load_some(grad + c, n) * scale - even, n);
  }
  grad[target] -= 1 - label_smoothing;
  return loss;
}

}  // namespace lgk::cpu::LGK_ISA
