// Weight gradient and optimizer step in one pass: the gradient exists in registers only. The formula: options.h.
//
// One block owns a tile of W and sums over all rows of the batch, in order.
#include "fused_update/cuda/kernels.h"
#include "fused_update/cuda/step.h"

namespace lgk::cuda {
namespace {

constexpr int kBlockColumns = kWarpColumns;  // of W; each warp spans them all
constexpr int kThreadRows = 8;
constexpr int kBlockRows = kWarps * kThreadRows;
constexpr int kBatch = 32;  // rows of the batch that lie in shared memory

struct Tensors {
  Matrix weight, first, second, gradient;
};

__global__ void __launch_bounds__(kThreads, 2) update(UpdateRule s, Decay decay, UpdateShape u, int64_t column_blocks,
                                                      Tensors tensors, StridedMatrix grad, StridedMatrix x) {
  LGK_DYNAMIC_SHARED(float, shared);  // (kBatch, kBlockRows) of grad, (kBatch, kBlockColumns) of x
  float* const shared_x = shared + kBatch * kBlockRows;
  const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * kThreadRows;
  const int64_t first_row = blockIdx.x / column_blocks * kBlockRows;
  const int64_t first_column = blockIdx.x % column_blocks * kBlockColumns;

  float sum[kThreadRows][kLaneColumns] = {};
  for (int64_t batch = 0; batch < u.batch; batch += kBatch) {
    __syncthreads();
    const int rows = static_cast<int>(min(u.batch - batch, int64_t{kBatch}));
    for (int i = threadIdx.x; i < rows * kBlockRows; i += kThreads) {
      const int64_t row = first_row + i % kBlockRows;
      shared[i] = row < u.rows ? load_element(grad, batch + i / kBlockRows, row) : 0.0f;
    }
    for (int i = threadIdx.x; i < rows * kBlockColumns; i += kThreads) {
      const int64_t column = first_column + i % kBlockColumns;
      shared_x[i] = column < u.columns ? load_element(x, batch + i / kBlockColumns, column) : 0.0f;
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
  if (column >= u.columns) return;
  const int64_t row = first_row + own_row;
  const int rows = static_cast<int>(min(u.rows - row, int64_t{kThreadRows}));
  const RowReader weights = reader_of(tensors.weight, row, column, u.columns);
  const RowReader firsts = reader_of(tensors.first, row, column, u.columns);
  const RowReader seconds = reader_of(tensors.second, row, column, u.columns);
  const RowReader gradients = reader_of(tensors.gradient, row, column, u.columns);
  const bool first = tensors.first.data != nullptr, second = s.rule == kAdam;
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (r >= rows) break;
    float w[kLaneColumns], g[kLaneColumns] = {}, m[kLaneColumns] = {}, v[kLaneColumns] = {};
    load_lane(weights, tensors.weight.dtype, r, w);
    if (tensors.gradient.data != nullptr) load_lane(gradients, tensors.gradient.dtype, r, g);
    if (first) load_lane(firsts, tensors.first.dtype, r, m);
    if (second) load_lane(seconds, tensors.second.dtype, r, v);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) w[c] = step_of(s, decay, sum[r][c] + g[c], w[c], first, m[c], v[c]);
    if (first) store_lane(firsts, tensors.first.dtype, r, m);
    if (second) store_lane(seconds, tensors.second.dtype, r, v);
    store_lane(weights, tensors.weight.dtype, r, w);
  }
}

}  // namespace

int fused_update(const UpdateRule& rule, const UpdateShape& shape, const Matrix& weight, const Matrix& first,
                 const Matrix& second, const Matrix& gradient, const StridedMatrix& grad, const StridedMatrix& x,
                 void* stream) {
  if (shape.rows == 0 || shape.columns == 0) return 0;
  const int64_t column_blocks = ceil_div<int64_t>(shape.columns, kBlockColumns);
  LGK_LAUNCH(update, dim3(column_blocks * ceil_div<int64_t>(shape.rows, kBlockRows)), dim3(kThreads),
             kBatch * (kBlockRows + kBlockColumns) * sizeof(float), stream, rule,
             Decay{static_cast<float>(rule.beta2), rule.fresh2()}, shape, column_blocks,
             Tensors{weight, first, second, gradient}, grad, x);
  return launch_status();
}

}  // namespace lgk::cuda
