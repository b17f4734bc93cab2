// Cross entropy of a row of logits with label smoothing: against q, which is 1 - label_smoothing at the target and
// label_smoothing spread over all classes. By a warp for rows in shared memory, by a block for rows in memory; they
// round differently, and results are kept to the bit.
#pragma once
#include "common/cuda/rows.h"

namespace lgk::cuda {

// The lane's part of the loss of logits z / temperature; z becomes (softmax - q) / divisor, or 0 where not `valid`.
LGK_DEVICE float warp_cross_entropy(int classes, float temperature, float label_smoothing, int64_t target, bool valid,
                                    float divisor, float* z) {
  const int lane = threadIdx.x % 32;
  float loss = 0.0f, largest = -INFINITY;
  for (int c = lane; c < classes; c += 32) largest = fmaxf(largest, z[c] / temperature);
  largest = warp_max(largest);
  float sum = 0.0f;
  for (int c = lane; c < classes; c += 32) sum += expf(z[c] / temperature - largest);
  sum = warp_sum(sum);
  const float log_sum = logf(sum), even = label_smoothing / static_cast<float>(classes);
  for (int c = lane; c < classes; c += 32) {
    const float shifted = z[c] / temperature - largest;
    const float q = even + (c == target ? 1.0f - label_smoothing : 0.0f);
    loss += q * (log_sum - shifted);
    z[c] = valid ? (expf(shifted) / sum - q) / divisor : 0.0f;
  }
  return loss;
}

// The loss of `row`; with `compute_grad` grad_scale * (softmax - q) replaces it. `shared`: kRowShared bytes.
LGK_DEVICE void block_cross_entropy(int64_t classes, float label_smoothing, float grad_scale, bool compute_grad,
                                    int64_t target, float* row, float* loss, float* shared) {
  float largest = -INFINITY;
  for (int64_t k = threadIdx.x; k < classes; k += blockDim.x) largest = fmaxf(largest, row[k]);
  largest = block_max(largest, shared);
  Sums sums{0.0f, 0.0f, 0.0f};  // of exp(v), of v, and v at the target, with v = logit - largest
  for (int64_t k = threadIdx.x; k < classes; k += blockDim.x) {
    const float v = row[k] - largest;
    sums.a += expf(v);
    sums.b += v;
    if (k == target) sums.c = v;
  }
  sums = block_sums(sums, shared);
  const float log_sum = logf(sums.a), even = label_smoothing / static_cast<float>(classes);
  if (threadIdx.x == 0) *loss = log_sum - (1.0f - label_smoothing) * sums.c - even * sums.b;
  if (!compute_grad) return;
  for (int64_t k = threadIdx.x; k < classes; k += blockDim.x) {
    const float p = expf(row[k] - largest - log_sum), q = even + (k == target ? 1.0f - label_smoothing : 0.0f);
    row[k] = (p - q) * grad_scale;
  }
}

}  // namespace lgk::cuda
