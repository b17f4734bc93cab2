// What describes an optimizer step on both processors (lgkernels/ops/offset/reference.py defines what it computes).
#pragma once
#include <cstdint>

namespace lgk {

//   g = local_scale * grad + offset_scale * offset + weight_decay * w;  v = momentum * v + g;  w -= lr * v
struct OffsetOptions {
  float lr, momentum, weight_decay, local_scale, offset_scale;
};

constexpr int kNoOffset = -1;  // beside the dtype codes

// One parameter and what belongs to it, `size` float32 values each (the offset: of its dtype), in one order.
struct OffsetTensor {
  float* param;
  const float* grad;
  float* momentum_buffer;  // null: no momentum
  const void* offset;      // null: none
  int64_t size, offset_dtype;
};

}  // namespace lgk
