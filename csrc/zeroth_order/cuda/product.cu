// x (W + c Z)^T + b for few rows of x: Z is made in registers, W is read once for eight rows of x.
//
//   out[i, n] = b[n] + sum over k of x[i, k] (W[n, k] + c_i Z[n, k]), in float32
//
// Made for so few rows that reading W bounds the time. A warp takes four rows n and every kSplits-th tile of 128
// columns; its lanes, then the warps of the same rows, are summed in a fixed order that depends on the shape alone.
#include "zeroth_order/cuda/noise.h"

namespace lgk::cuda {
namespace {

constexpr int kRows = 8;                     // rows of x that a block takes
constexpr int kSplits = 4;                   // warps that share the columns of four rows n
constexpr int kRowWarps = kWarps / kSplits;  // of such groups in a block
constexpr int kSums = kTileRows * kRows;

struct Product {
  int64_t rows, together, columns_of_out;  // of a member; that share a matrix of noise; n
  int64_t tiles;                           // of 128 columns
};

// Grid (groups of rows n, groups of rows of x, matrices of noise).
__global__ void __launch_bounds__(kThreads, 2)
    product(Noise noise, Product p, Matrix weight, Matrix x, Matrix bias, char* __restrict__ out) {
  LGK_DYNAMIC_SHARED(uint32_t, shared);  // (warps, kTile) to make tiles; then (warps, kSums) for the sums
  const Formula law = law_of(noise);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* const tile = shared + warp * kTile;
  const int64_t first_n = (int64_t{blockIdx.x} * kRowWarps + warp / kSplits) * kTileRows;
  const int64_t first_row = int64_t{blockIdx.y} * kRows, group = blockIdx.z;
  const int64_t first_x = group * p.together + first_row;  // among all rows of x
  const int own_rows = static_cast<int>(min(p.together - first_row, int64_t{kRows}));
  const RandomState state = state_of(noise, group);

  float c[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) c[i] = i < own_rows ? noise.coefficients[(first_x + i) / p.rows] : 0.0f;
  float sum[kTileRows][kRows] = {};
  for (int64_t k = warp % kSplits; k < p.tiles; k += kSplits) {
    const int64_t column = k * kWarpColumns + lane * kLaneColumns;
    begin_tile(law, state, [=](int r) { return static_cast<uint32_t>(first_n) + r; }, k * kWarpColumns, lane, tile);
    const RowReader rows = row_reader(x.data, x.dtype, x.stride, first_x, column, law.columns);
    const RowReader weights = row_reader(weight.data, weight.dtype, weight.stride, first_n, column, law.columns);
    float left[kRows][kLaneColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) left[i][j] = 0.0f;
      if (i < own_rows && rows.count > 0) load_lane(rows, x.dtype, i, left[i]);
    }
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      float z[kLaneColumns], w[kLaneColumns] = {};
      noise_values(law, r, lane, tile, z);
      if (first_n + r < law.rows && weights.count > 0) load_lane(weights, weight.dtype, r, w);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) sum[r][i] = fmaf(left[i][j], fmaf(c[i], z[j], w[j]), sum[r][i]);
    }
  }

  __syncthreads();  // the tiles have been read
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < kTileRows; ++r)
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float total = warp_sum(sum[r][i]);
      if (lane == 0) sums[warp * kSums + r * kRows + i] = total;
    }
  __syncthreads();
  if (threadIdx.x >= kRowWarps * kSums) return;
  const int own = threadIdx.x / kSums, r = threadIdx.x % kSums / kRows, i = threadIdx.x % kRows;
  const int64_t n = (int64_t{blockIdx.x} * kRowWarps + own) * kTileRows + r;
  if (n >= law.rows || i >= own_rows) return;
  float total = 0.0f;
  for (int split = 0; split < kSplits; ++split) total += sums[(own * kSplits + split) * kSums + threadIdx.x % kSums];
  if (bias.data != nullptr) total += load_element(StridedMatrix{bias.data, bias.dtype, 0, 1}, 0, n);
  const int64_t at = (first_x + i) * p.columns_of_out + n;
  if (x.dtype == kFloat32) {
    reinterpret_cast<float*>(out)[at] = total;
  } else if (x.dtype == kBFloat16) {
    reinterpret_cast<bf16*>(out)[at] = from_float<bf16>(total);
  } else {
    reinterpret_cast<f16*>(out)[at] = from_float<f16>(total);
  }
}

}  // namespace

int zeroth_order_product(const FormulaNoise& noise, const Members& shape, const Matrix& weight, const Matrix& x,
                         const Matrix& bias, void* out, void* stream) {
  const int64_t all = shape.members * shape.rows;
  if (all == 0 || shape.outputs == 0) return 0;
  const int64_t groups = noise.count > 1 ? noise.count : 1, together = all / groups;
  const Product p{shape.rows, together, shape.outputs, ceil_div<int64_t>(shape.inputs, kWarpColumns)};
  LGK_LAUNCH(product,
             dim3(ceil_div<int64_t>(shape.outputs, kRowWarps * kTileRows), ceil_div<int64_t>(together, kRows), groups),
             dim3(kThreads), kWarps * kTile * sizeof(uint32_t), stream, noise_of(noise, shape.outputs, shape.inputs), p,
             weight, x, bias, static_cast<char*>(out));
  return launch_status();
}

}  // namespace lgk::cuda
