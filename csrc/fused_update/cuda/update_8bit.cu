// The step of update.cu with states of 8 bits: a warp owns four rows of a block of 256 columns, and rounds their new
// states to codes once it has found the largest of each row.
#include "fused_update/cuda/codes.h"
#include "fused_update/cuda/kernels.h"
#include "fused_update/cuda/step.h"

namespace lgk::cuda {
namespace {

constexpr int kBlockColumns = kCodeBlock;
constexpr int kParts = kBlockColumns / kWarpColumns;  // each lane has four columns of every part
constexpr int kThreadRows = 4;
constexpr int kBlockRows = kWarps * kThreadRows;
constexpr int kBatch = 32;  // rows of the batch that lie in shared memory

struct Tensors {
  Matrix weight, gradient;
  CodedState first, second;
};

// New states of a row to codes; `count` of a lane's columns are there in each part.
template <bool SIGNED>
LGK_DEVICE void round_row(const CodedState& state, int64_t at, int64_t block,
                          const float (&value)[kParts][kLaneColumns], const int (&count)[kParts]) {
  float size = 0.0f;
#pragma unroll
  for (int p = 0; p < kParts; ++p)
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      if (c < count[p]) size = fmaxf(size, finite_size(value[p][c]));
  const float absmax = block_absmax(size);
  if (threadIdx.x % 32 == 0) state.absmax[block] = absmax;
  const bool usable = absmax > 0.0f;
#pragma unroll
  for (int p = 0; p < kParts; ++p)
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c)
      if (c < count[p])
        state.codes[at + p * kWarpColumns + c] =
            static_cast<uint8_t>(encode<SIGNED>(usable ? value[p][c] / absmax : 0.0f));
}

__global__ void __launch_bounds__(kThreads, 2)
    update_8bit(UpdateRule s, Decay decay, UpdateShape u, int64_t column_blocks, Tensors tensors, StridedMatrix grad,
                StridedMatrix x) {
  LGK_DYNAMIC_SHARED(float, shared);  // (kBatch, kBlockRows) of grad, (kBatch, kBlockColumns) of x
  float* const shared_x = shared + kBatch * kBlockRows;
  const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * kThreadRows;
  const int64_t first_row = blockIdx.x / column_blocks * kBlockRows;
  const int64_t first_column = blockIdx.x % column_blocks * kBlockColumns;

  float sum[kThreadRows][kParts][kLaneColumns] = {};
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
      const Pack<float, 4> left = *reinterpret_cast<const Pack<float, 4>*>(shared + b * kBlockRows + own_row);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const Pack<float, 4> right =
            *reinterpret_cast<const Pack<float, 4>*>(shared_x + b * kBlockColumns + p * kWarpColumns + lane * 4);
#pragma unroll
        for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
          for (int c = 0; c < kLaneColumns; ++c) sum[r][p][c] = fmaf(left.element[r], right.element[c], sum[r][p][c]);
      }
    }
  }

  const int64_t row = first_row + own_row, column = first_column + lane * kLaneColumns;
  const int rows = static_cast<int>(min(u.rows - row, int64_t{kThreadRows}));
  const bool second = s.rule == kAdam;
  int count[kParts];
#pragma unroll
  for (int p = 0; p < kParts; ++p) count[p] = lane_count(u.columns, column + p * kWarpColumns);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (r >= rows) break;  // the same for all lanes of a warp
    const int64_t at = (row + r) * u.columns + column, block = (row + r) * column_blocks + first_column / kBlockColumns;
    const float first_max = tensors.first.absmax[block], second_max = second ? tensors.second.absmax[block] : 0.0f;
    float m[kParts][kLaneColumns] = {}, v[kParts][kLaneColumns] = {};
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int64_t part = column + p * kWarpColumns;
      const RowReader weights = reader_of(tensors.weight, row, part, u.columns);
      float w[kLaneColumns], g[kLaneColumns] = {};
      load_lane(weights, tensors.weight.dtype, r, w);
      if (tensors.gradient.data != nullptr)
        load_lane(reader_of(tensors.gradient, row, part, u.columns), tensors.gradient.dtype, r, g);
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) {
        if (c >= count[p]) continue;
        const int64_t place = at + p * kWarpColumns + c;
        m[p][c] = decode<true>(tensors.first.codes[place]) * first_max;
        if (second) v[p][c] = decode<false>(tensors.second.codes[place]) * second_max;
        w[c] = step_of(s, decay, sum[r][p][c] + g[c], w[c], true, m[p][c], v[p][c]);
      }
      store_lane(weights, tensors.weight.dtype, r, w);
    }
    __syncwarp();  // every lane has read the absmax that the first one writes
    round_row<true>(tensors.first, at, block, m, count);
    if (second) round_row<false>(tensors.second, at, block, v, count);
  }
}

}  // namespace

int fused_update_8bit(const UpdateRule& rule, const UpdateShape& shape, const Matrix& weight, const CodedState& first,
                      const CodedState& second, const Matrix& gradient, const StridedMatrix& grad,
                      const StridedMatrix& x, void* stream) {
  if (shape.rows == 0 || shape.columns == 0) return 0;
  const int64_t column_blocks = ceil_div<int64_t>(shape.columns, kBlockColumns);
  LGK_LAUNCH(update_8bit, dim3(column_blocks * ceil_div<int64_t>(shape.rows, kBlockRows)), dim3(kThreads),
             kBatch * (kBlockRows + kBlockColumns) * sizeof(float), stream, rule,
             Decay{static_cast<float>(rule.beta2), rule.fresh2()}, shape, column_blocks,
             Tensors{weight, gradient, first, second}, grad, x);
  return launch_status();
}

}  // namespace lgk::cuda
