// The linear head of a replicated loss, cross entropy, and the signal that it teaches.
//
// Few classes: a warp owns a row, a lane a class (or a part of its sum), and the block keeps a slice of the weight in
// shared memory. Many: the library multiplies, and a block owns a row of the logits.
#include "common/cuda/cross_entropy.h"
#include "common/cuda/rows.h"
#include "forward_gradient/cuda/four.h"

namespace lgk::cuda {
namespace {

constexpr int kHeadRows = 8;  // warps of a block
constexpr int kHeadThreads = 32 * kHeadRows;
constexpr int kHeadSlice = 8 * 1024;  // floats of the weight in shared memory
constexpr int kMostClasses = 32;

LGK_DEVICE float read_one(const Array& array, int64_t at) {
  if (array.dtype == kFloat32) return static_cast<const float*>(array.data)[at];
  if (array.dtype == kBFloat16) return to_float(static_cast<const bf16*>(array.data)[at]);
  return to_float(static_cast<const f16*>(array.data)[at]);
}

// Rows [begin, end) of the weight into shared memory; all threads of the block take part.
LGK_DEVICE void read_slice(const Array& weight, int begin, int end, int classes, float* shared) {
  __syncthreads();  // the slice before has been read
  for (int k = threadIdx.x; k < (end - begin) * classes; k += kHeadThreads)
    shared[k] = read_one(weight, int64_t{begin} * classes + k);
  __syncthreads();
}

// `span`: the power of two from `classes` on; 32 / span lanes share a class.
__global__ void __launch_bounds__(kHeadThreads)
    head_rows(int64_t rows, int width, int classes, int span, const float* __restrict__ pooled, Array weight,
              Array bias, const int64_t* __restrict__ target, float* __restrict__ loss, float* __restrict__ delta,
              float* __restrict__ teach) {
  LGK_DYNAMIC_SHARED(float, shared);
  const int lane = threadIdx.x % 32, k = lane % span, part = lane / span, parts = 32 / span;
  const int64_t own = int64_t{blockIdx.x} * kHeadRows + threadIdx.x / 32, row = min(own, rows - 1);
  const bool exists = own == row, one = k < classes;
  const int slice = kHeadSlice / classes;
  float logit = 0.0f;
  for (int begin = 0; begin < width; begin += slice) {
    const int end = min(begin + slice, width);
    read_slice(weight, begin, end, classes, shared);
    if (one)
      for (int d = begin + part; d < end; d += parts)
        logit += pooled[row * width + d] * shared[(d - begin) * classes + k];
  }
  for (int step = span; step < 32; step *= 2) logit += __shfl_xor_sync(kAllLanes, logit, step);
  if (bias.data != nullptr && one) logit += read_one(bias, k);
  const float most = warp_max(one ? logit : -INFINITY);
  const float share = one ? expf(logit - most) : 0.0f;
  const float total = warp_sum(part == 0 ? share : 0.0f);
  const int label = static_cast<int>(target[row]);
  const float right = __shfl_sync(kAllLanes, logit, label);
  const float error = one ? share / total - (k == label ? 1.0f : 0.0f) : 0.0f;
  if (exists && lane == 0) loss[row] = logf(total) - (right - most);
  if (exists && one && part == 0) delta[row * classes + k] = error;
  for (int begin = 0; begin < width; begin += slice) {
    const int end = min(begin + slice, width);
    if (width > slice) read_slice(weight, begin, end, classes, shared);
    for (int first = begin; first < end; first += 32) {
      const int d = min(first + lane, end - 1);
      float sum = 0.0f;
      for (int j = 0; j < classes; ++j) sum += __shfl_sync(kAllLanes, error, j) * shared[(d - begin) * classes + j];
      if (exists && first + lane < end) teach[row * width + d] = sum;
    }
  }
}

__global__ void __launch_bounds__(kRowThreads, 2)
    softmax_rows(int64_t classes, const int64_t* __restrict__ target, float* logits, float* loss) {
  LGK_DYNAMIC_SHARED(float, shared);
  block_cross_entropy(classes, 0.0f, 1.0f, true, target[blockIdx.x], logits + blockIdx.x * classes, loss + blockIdx.x,
                      shared);
}

}  // namespace

int forward_gradient_head(int64_t rows, int width, int classes, const float* pooled, const Array& weight,
                          const Array& bias, const int64_t* target, float* loss, float* delta, float* teach,
                          void* stream) {
  const int64_t blocks = ceil_div<int64_t>(rows, kHeadRows);
  if (classes < 1 || classes > kMostClasses || blocks >= INT32_MAX) return kInvalidArgument;
  LGK_LAUNCH(head_rows, dim3(blocks), dim3(kHeadThreads), kHeadSlice * sizeof(float), stream, rows, width, classes,
             power_of_two_from(classes, 32), pooled, weight, bias, target, loss, delta, teach);
  return launch_status();
}

int forward_gradient_softmax(int64_t rows, int64_t classes, const int64_t* target, float* logits, float* loss,
                             void* stream) {
  if (rows >= INT32_MAX) return kInvalidArgument;
  LGK_LAUNCH(softmax_rows, dim3(rows), dim3(row_threads(classes)), kRowShared, stream, classes, target, logits, loss);
  return launch_status();
}

}  // namespace lgk::cuda
