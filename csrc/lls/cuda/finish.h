// What is left of an LLS head once every sample has been through it: the sum of the losses and the modulation's
// gradient. Both are a launch of their own, or blocks of a later launch, which saves a training step two of them.
// Any block of kThreads threads, in one dimension or two.
#pragma once
#include "lls/cuda/bins.h"

namespace lgk::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kTile = 16;  // of the gradient of a matrix
constexpr int kFinishShared = 2 * kThreads * static_cast<int>(sizeof(float));
static_assert(kTile * kTile == kThreads, "a thread computes one entry of a tile");

LGK_DEVICE int thread_index() { return threadIdx.y * blockDim.x + threadIdx.x; }

// Sum over the block in `reduce` (kWarps values); every thread gets it.
template <typename Value>
LGK_DEVICE Value block_sum(Value value, Value* reduce) {
  value = warp_sum(value);
  __syncthreads();  // `reduce` may still be read
  if (thread_index() % 32 == 0) reduce[thread_index() / 32] = value;
  __syncthreads();
  Value sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += reduce[warp];
  return sum;
}

// Rows that are not ignored: what the mean of the losses divides by.
LGK_DEVICE float valid_rows(int64_t batch, int64_t ignore_index, const int64_t* target, float* reduce) {
  int valid = 0;
  for (int64_t b = thread_index(); b < batch; b += kThreads) valid += target[b] != ignore_index;
  return static_cast<float>(block_sum(valid, reinterpret_cast<int*>(reduce)));
}

// One block: the mean or the sum of the rows' losses, in a fixed order.
LGK_DEVICE void sum_losses(int64_t batch, bool mean, int64_t ignore_index, const int64_t* target, const float* row_loss,
                           float* loss, float* reduce) {
  const float divisor = mean ? valid_rows(batch, ignore_index, target, reduce) : 1.0f;
  float sum = 0.0f;
  for (int64_t b = thread_index(); b < batch; b += kThreads) sum += row_loss[b];
  sum = block_sum(sum, reduce);
  if (thread_index() == 0) *loss = sum / divisor;
}

inline int modulation_tiles(const ModulationGrad& p) {
  return p.vector ? ceil_div(p.classes, 32) : ceil_div(p.classes, kTile) * ceil_div(p.rows, kTile);
}

// Tile number `tile`: 32 entries of a vector, or kTile x kTile of a matrix. `shared`: 2 * kThreads floats.
LGK_DEVICE void modulation_tile(const ModulationGrad& p, int tile, float* shared) {
  const int thread = thread_index();
  const auto scaled = [&](int64_t b, int c) {
    const float g = p.grad_logits[b * p.classes + c];
    return p.scale == nullptr ? g : g * p.scale[p.scale_per_row ? b : 0];
  };
  if (p.vector) {
    const int x = thread % 32, y = thread / 32, c = tile * 32 + x;
    float sum = 0.0f;
    if (c < p.classes)
      for (int64_t b = y; b < p.batch; b += kWarps) sum += scaled(b, c) * p.similarity[b * p.classes + c];
    shared[y * 32 + x] = sum;
    __syncthreads();
    if (y != 0 || c >= p.classes) return;
    sum = 0.0f;
    for (int row = 0; row < kWarps; ++row) sum += shared[row * 32 + x];
    p.grad[c] = sum;
    return;
  }
  const int tiles = ceil_div(p.classes, kTile), x = thread % kTile, y = thread / kTile;
  const int c = tile % tiles * kTile + x, k0 = tile / tiles * kTile, k = k0 + y;
  float* const s = shared;  // (kTile rows of the batch, kTile)
  float* const g = shared + kThreads;
  float sum = 0.0f;
  for (int64_t first = 0; first < p.batch; first += kTile) {
    const int64_t b = first + y;
    s[thread] = b < p.batch && k0 + x < p.rows ? p.similarity[b * p.rows + k0 + x] : 0.0f;
    g[thread] = b < p.batch && c < p.classes ? scaled(b, c) : 0.0f;
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kTile; ++row) sum = fmaf(s[row * kTile + y], g[row * kTile + x], sum);
    __syncthreads();
  }
  if (k < p.rows && c < p.classes) p.grad[int64_t{k} * p.classes + c] = sum;
}

inline int finish_blocks(const Finish& finish) {
  if (finish.loss == nullptr) return 0;
  return 1 + (finish.modulation.grad == nullptr ? 0 : modulation_tiles(finish.modulation));
}

// Block number `block` of finish_blocks(). `shared`: kFinishShared bytes.
LGK_DEVICE void finish_head(const Finish& finish, int block, float* shared) {
  if (block == 0) {
    sum_losses(finish.modulation.batch, true, finish.ignore_index, finish.target, finish.row_loss, finish.loss, shared);
  } else {
    modulation_tile(finish.modulation, block - 1, shared);
  }
}

}  // namespace lgk::cuda
