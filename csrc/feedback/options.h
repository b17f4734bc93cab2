// What describes an optimizer step on both processors (lgkernels/ops/feedback/reference.py defines what it computes).
#pragma once

namespace lgk {

//   g = grad_scale * grad^T x;  manhattan: g = sign(g);  g += weight_decay * W
//   v = momentum * v + (1 - dampening) * g;  W -= lr * (nesterov: g + momentum * v | v; no momentum: g)
struct SgdOptions {
  float lr, momentum, dampening, weight_decay;
  bool nesterov, manhattan;
  float grad_scale;
};

}  // namespace lgk
