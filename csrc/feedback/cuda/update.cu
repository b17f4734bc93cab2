// Weight gradient and optimizer step in one pass: the gradient exists in registers only.
//
//   g = grad_scale * sum over m of grad[m, n] x[m, k];  manhattan: g = sign(g);  g += weight_decay * W
//   v = momentum * v + (1 - dampening) * g;  W -= lr * (nesterov: g + momentum * v | v; no momentum: g)
//
// One block owns a tile of W and sums over all rows m, in order.
#include "common/cuda/formula.h"
#include "feedback/cuda/kernels.h"

namespace lgk::cuda {
namespace {

constexpr int kBlockColumns = kWarpColumns;  // of W; each warp spans them all
constexpr int kThreadRows = 8;
constexpr int kBlockRows = kWarps * kThreadRows;
constexpr int kBatch = 32;  // rows m that lie in shared memory

LGK_DEVICE float step_of(const SgdOptions& s, float sum, float weight, const Matrix& momentum_buffer, float& v) {
  float g = sum * s.grad_scale;
  if (s.manhattan) g = static_cast<float>((g > 0.0f) - (g < 0.0f));
  g = fmaf(s.weight_decay, weight, g);
  if (momentum_buffer.data == nullptr) return g;
  v = fmaf(s.momentum, v, (1.0f - s.dampening) * g);
  return s.nesterov ? fmaf(s.momentum, v, g) : v;
}

__global__ void __launch_bounds__(kThreads, 2)
    sgd_update(SgdOptions s, int64_t m, int64_t n, int64_t k, int64_t column_blocks, StridedMatrix grad,
               StridedMatrix x, Matrix weight, Matrix momentum_buffer) {
  LGK_DYNAMIC_SHARED(float, shared);  // (kBatch, kBlockRows) of grad, (kBatch, kBlockColumns) of x
  float* const shared_x = shared + kBatch * kBlockRows;
  const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * kThreadRows;
  const int64_t first_row = blockIdx.x / column_blocks * kBlockRows;
  const int64_t first_column = blockIdx.x % column_blocks * kBlockColumns;

  float sum[kThreadRows][kLaneColumns] = {};
  for (int64_t batch = 0; batch < m; batch += kBatch) {
    __syncthreads();
    const int rows = static_cast<int>(min(m - batch, int64_t{kBatch}));
    for (int i = threadIdx.x; i < rows * kBlockRows; i += kThreads) {
      const int64_t row = first_row + i % kBlockRows;
      shared[i] = row < n ? load_element(grad, batch + i / kBlockRows, row) : 0.0f;
    }
    for (int i = threadIdx.x; i < rows * kBlockColumns; i += kThreads) {
      const int64_t column = first_column + i % kBlockColumns;
      shared_x[i] = column < k ? load_element(x, batch + i / kBlockColumns, column) : 0.0f;
    }
    __syncthreads();
    for (int b = 0; b < rows; ++b) {
      const Pack<float, 4> right = *reinterpret_cast<const Pack<float, 4>*>(shared_x + b * kBlockColumns + lane * 4);
#pragma unroll
      for (int r = 0; r < kThreadRows; r += 4) {
        const Pack<float, 4> left = *reinterpret_cast<const Pack<float, 4>*>(shared + b * kBlockRows + own_row + r);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) sum[r + i][c] = fmaf(left.element[i], right.element[c], sum[r + i][c]);
      }
    }
  }

  const int64_t column = first_column + lane * kLaneColumns;
  if (column >= k) return;
  const int64_t row = first_row + own_row;
  const int rows = static_cast<int>(min(n - row, int64_t{kThreadRows}));
  const RowReader weights = row_reader(weight.data, weight.dtype, weight.stride, row, column, k);
  const RowReader buffers =
      row_reader(momentum_buffer.data, momentum_buffer.dtype, momentum_buffer.stride, row, column, k);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (r >= rows) break;
    float w[kLaneColumns], v[kLaneColumns] = {};
    load_lane(weights, weight.dtype, r, w);
    if (momentum_buffer.data != nullptr) load_lane(buffers, momentum_buffer.dtype, r, v);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) w[c] = fmaf(-s.lr, step_of(s, sum[r][c], w[c], momentum_buffer, v[c]), w[c]);
    if (momentum_buffer.data != nullptr) store_lane(buffers, momentum_buffer.dtype, r, v);
    store_lane(weights, weight.dtype, r, w);
  }
}

}  // namespace

int feedback_sgd_update(const SgdOptions& options, const UpdateShape& shape, const StridedMatrix& grad,
                        const StridedMatrix& x, const Matrix& weight, const Matrix& momentum_buffer, void* stream) {
  const int64_t m = shape.m, n = shape.n, k = shape.k;
  if (n == 0 || k == 0) return 0;
  const int64_t column_blocks = ceil_div<int64_t>(k, kBlockColumns);
  LGK_LAUNCH(sgd_update, dim3(column_blocks * ceil_div<int64_t>(n, kBlockRows)), dim3(kThreads),
             kBatch * (kBlockRows + kBlockColumns) * sizeof(float), stream, options, m, n, k, column_blocks, grad, x,
             weight, momentum_buffer);
  return launch_status();
}

}  // namespace lgk::cuda
