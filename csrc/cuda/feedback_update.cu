// Weight gradient and optimizer step in one pass: the gradient exists in registers only.
//
//   g = grad_scale * sum over m of grad[m, n] x[m, k];  manhattan: g = sign(g);  g += weight_decay * W
//   v = momentum * v + (1 - dampening) * g;  W -= lr * (nesterov: g + momentum * v | v; no momentum: g)
//
// One block owns a tile of W and sums over all rows m, in order.
#include "lgk/feedback_device.h"

namespace lgk {
namespace {

constexpr int kBlockColumns = kWarpColumns;  // of W; each warp spans them all
constexpr int kThreadRows = 8;
constexpr int kBlockRows = kWarps * kThreadRows;
constexpr int kBatch = 32;  // rows m that lie in shared memory

struct Rows {
  void* data;
  int dtype;
  int64_t stride;
};

LGK_DEVICE float step_of(const SgdStep& s, float sum, float weight, const Rows& velocity, float& v) {
  float g = sum * s.grad_scale;
  if (s.manhattan) g = static_cast<float>((g > 0.0f) - (g < 0.0f));
  g = fmaf(s.weight_decay, weight, g);
  if (velocity.data == nullptr) return g;
  v = fmaf(s.momentum, v, (1.0f - s.dampening) * g);
  return s.nesterov ? fmaf(s.momentum, v, g) : v;
}

__global__ void __launch_bounds__(kThreads, 2)
    sgd_update(SgdStep s, int64_t m, int64_t n, int64_t k, int64_t column_blocks, Operand grad, Operand x, Rows weight,
               Rows velocity) {
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
  RowReader velocities{};
  if (velocity.data != nullptr) velocities = row_reader(velocity.data, velocity.dtype, velocity.stride, row, column, k);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (r >= rows) break;
    float w[kLaneColumns], v[kLaneColumns] = {};
    load_lane(weights, weight.dtype, r, w);
    if (velocity.data != nullptr) load_lane(velocities, velocity.dtype, r, v);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) w[c] = fmaf(-s.lr, step_of(s, sum[r][c], w[c], velocity, v[c]), w[c]);
    if (velocity.data != nullptr) store_lane(velocities, velocity.dtype, r, v);
    store_lane(weights, weight.dtype, r, w);
  }
}

}  // namespace

int feedback_sgd_update(const SgdStep& step, int64_t m, int64_t n, int64_t k, const Operand& grad, const Operand& x,
                        void* weight, int weight_dtype, int64_t weight_stride, void* velocity, int velocity_dtype,
                        int64_t velocity_stride, void* stream) {
  if (n == 0 || k == 0) return 0;
  const int64_t column_blocks = ceil_div<int64_t>(k, kBlockColumns);
  LGK_LAUNCH(sgd_update, dim3(column_blocks * ceil_div<int64_t>(n, kBlockRows)), dim3(kThreads),
             kBatch * (kBlockRows + kBlockColumns) * sizeof(float), stream, step, m, n, k, column_blocks, grad, x,
             Rows{weight, weight_dtype, weight_stride}, Rows{velocity, velocity_dtype, velocity_stride});
  return launch_status();
}

}  // namespace lgk
