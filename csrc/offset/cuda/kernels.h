// The CUDA entry point of the family offset (lgkernels/ops/offset/reference.py defines what it computes).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include "offset/options.h"

namespace lgk::cuda {

// All tensors in one pass, by one launch for every kOffsetEntries of them.
constexpr int kOffsetEntries = 72;
int offset_sgd(const OffsetOptions& options, const OffsetTensor* tensors, int64_t count, void* stream);

}  // namespace lgk::cuda
