// The optimizer step of the BP-modified local loss over many tensors: 24 bytes a parameter.
//
//   g = local_scale * grad + offset_scale * offset + weight_decay * w;  v = momentum * v + g;  w -= lr * v
//
// The tensors' addresses are an argument of the kernel, so nothing is copied to the device and a CUDA graph can hold
// the launch. Each block takes one chunk of one tensor.
#include "common/cuda/device.h"
#include "offset/cuda/kernels.h"

namespace lgk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLane = 4;   // elements of a 16-byte access
constexpr int kLoads = 2;  // of each of the four tensors in flight
constexpr int kChunk = 4 * kThreads * kLane * kLoads;

struct Table {  // at most 4 KiB, which every driver takes as an argument
  OffsetTensor tensor[kOffsetEntries];
  unsigned first_block[kOffsetEntries];
  int count;
};

LGK_DEVICE void load_offset(const OffsetTensor& t, int64_t k, int count, bool aligned, float (&value)[kLane]) {
  const int dtype = static_cast<int>(t.offset_dtype);
  if (dtype == kNoOffset) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) value[i] = 0.0f;
  } else if (dtype == kFloat32) {
    const auto pack = load<float, kLane>(static_cast<const float*>(t.offset) + k, count, aligned);
#pragma unroll
    for (int i = 0; i < kLane; ++i) value[i] = pack.element[i];
  } else {
    const auto pack = load<bf16, kLane>(static_cast<const bf16*>(t.offset) + k, count, aligned);
#pragma unroll
    for (int i = 0; i < kLane; ++i) value[i] = to_float(pack.element[i]);
  }
}

__global__ void __launch_bounds__(kThreads, 2) offset_step(const OffsetOptions s, const LGK_GRID_CONSTANT Table table) {
  int low = 0, high = table.count;  // the last tensor that begins at or before this block
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const OffsetTensor t = table.tensor[low];
  const int64_t begin = int64_t{blockIdx.x - table.first_block[low]} * kChunk, end = min(begin + kChunk, t.size);
  const uintptr_t bits = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad) |
                         reinterpret_cast<uintptr_t>(t.momentum_buffer) | reinterpret_cast<uintptr_t>(t.offset);
  const bool aligned = bits % 16 == 0;
  for (int64_t first = begin + threadIdx.x * kLane; first < end; first += kThreads * kLane * kLoads) {
    Pack<float, kLane> w[kLoads], g[kLoads], v[kLoads];
    float offset[kLoads][kLane];
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int64_t k = first + q * kThreads * kLane;
      if (k >= end) continue;
      const int count = static_cast<int>(min(end - k, int64_t{kLane}));
      const bool whole = aligned && count == kLane;
      w[q] = load<float, kLane>(t.param + k, count, whole);
      g[q] = load<float, kLane>(t.grad + k, count, whole);
      if (t.momentum_buffer != nullptr) v[q] = load<float, kLane>(t.momentum_buffer + k, count, whole);
      load_offset(t, k, count, whole, offset[q]);
    }
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int64_t k = first + q * kThreads * kLane;
      if (k >= end) continue;
      const int count = static_cast<int>(min(end - k, int64_t{kLane}));
      const bool whole = aligned && count == kLane;
      float param[kLane], buffer[kLane];
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const float sum =
            fmaf(s.weight_decay, w[q].element[i], fmaf(s.offset_scale, offset[q][i], s.local_scale * g[q].element[i]));
        buffer[i] = t.momentum_buffer == nullptr ? sum : fmaf(s.momentum, v[q].element[i], sum);
        param[i] = fmaf(-s.lr, buffer[i], w[q].element[i]);
      }
      if (t.momentum_buffer != nullptr) store<float, kLane>(t.momentum_buffer + k, buffer, count, whole);
      store<float, kLane>(t.param + k, param, count, whole);
    }
  }
}

}  // namespace

int offset_sgd(const OffsetOptions& options, const OffsetTensor* tensors, int64_t count, void* stream) {
  static_assert(sizeof(Table) + sizeof(OffsetOptions) <= 4096, "the arguments of a kernel");
  Table table{};
  unsigned blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (tensors[i].size > 0) {
      table.tensor[table.count] = tensors[i];
      table.first_block[table.count++] = blocks;
      blocks += static_cast<unsigned>(ceil_div<int64_t>(tensors[i].size, kChunk));
    }
    if (table.count == 0 || (table.count < kOffsetEntries && i + 1 < count)) continue;
    LGK_LAUNCH(offset_step, dim3(blocks), dim3(kThreads), 0, stream, options, table);
    if (const int status = launch_status(); status != 0) return status;
    table.count = 0;
    blocks = 0;
  }
  return 0;
}

}  // namespace lgk::cuda
