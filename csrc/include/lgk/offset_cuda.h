// The CUDA entry point of the family offset (lgkernels/ops/offset/reference.py defines what it computes).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include <cstdint>

namespace lgk {

enum OffsetKind : int { kNoOffset = -1 };  // besides the dtype codes

// One parameter: weight, gradient and velocity (nullptr: no momentum) in float, the offset in float or bf16.
struct OffsetEntry {
  float* weight;
  const float* grad;
  float* velocity;
  const void* offset;
  int64_t size;
  int offset_kind;
};

struct OffsetFactors {
  float lr, momentum, weight_decay, grad_scale, offset_scale;  // grad_scale: local_scale * grad_scale of the op
};

// All tensors in one pass, by one launch for every kOffsetEntries of them.
constexpr int kOffsetEntries = 72;
int offset_sgd(const OffsetFactors& step, const OffsetEntry* tensors, int64_t count, void* stream);

}  // namespace lgk
