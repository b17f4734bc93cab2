// What describes an optimizer step on both processors (lgkernels/ops/fused_update/reference.py defines what it
// computes).
#pragma once
#include <cmath>
#include <cstdint>

namespace lgk {

enum Rule : int { kSgd = 0, kManhattan = 1, kAdam = 2 };

//   g = clip(grad_scale * (grad^T x + gradient), +-clip_value);  manhattan: g = sign(g);  g += weight_decay * W
//   m = momentum * m + fresh * g;  adam: v = beta2 * v + (1 - beta2) * g^2
//   W = keep * W - lr * (nesterov: g + momentum * m | adam: m / (sqrt(v) / root + eps) | m; no m: g)
struct UpdateRule {
  Rule rule;
  float lr, momentum, fresh, weight_decay, keep;
  bool nesterov;
  double beta2;
  float eps, root, grad_scale, clip_value;

  float fresh2() const { return static_cast<float>(1.0 - beta2); }
};

// A state of 8 bits, (rows, columns) of codes and (rows, blocks of 256 columns) of absmax, both dense; null: none.
struct CodedState {
  uint8_t* codes;
  float* absmax;
};

}  // namespace lgk
