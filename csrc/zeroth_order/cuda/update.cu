// The step along noise by formula, in one pass over the weight.
//
//   W <- keep * W + sum over i of c_i Z_i, each product and each sum rounded by itself, in the order of i
#include "zeroth_order/cuda/noise.h"

namespace lgk::cuda {
namespace {

constexpr int kWarpRows = 4 * kTileRows;  // of the 128 columns that a warp takes

// Never fused with what follows: the step is defined to the bit.
LGK_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

LGK_DEVICE float sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

__global__ void __launch_bounds__(kThreads, 2)
    update(Noise noise, int64_t count, Matrix weight, int64_t column_tiles, float keep) {
  LGK_DYNAMIC_SHARED(uint32_t, shared);  // (warps, kTile)
  const Formula law = law_of(noise);
  const WarpPlace place = place_of_warp(column_tiles, kWarpRows);
  if (place.row >= law.rows) return;  // the whole warp
  uint32_t* const tile = shared + threadIdx.x / 32 * kTile;
  const int lane = threadIdx.x % 32, rows = static_cast<int>(min(law.rows - place.row, int64_t{kWarpRows}));
  const RowReader weights =
      row_reader(weight.data, weight.dtype, weight.stride, place.row, place.column + lane * kLaneColumns, law.columns);
  for (int row = 0; row < rows; row += kTileRows) {
    const uint32_t first = static_cast<uint32_t>(place.row + row);
    float step[kTileRows][kLaneColumns];
    for (int64_t i = 0; i < count; ++i) {
      begin_tile(law, state_of(noise, i), [=](int r) { return first + r; }, place.column, lane, tile);
      const float c = noise.coefficients[i];
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        float z[kLaneColumns];
        noise_values(law, r, lane, tile, z);
#pragma unroll
        for (int k = 0; k < kLaneColumns; ++k) {
          const float moved = product(z[k], c);
          step[r][k] = i == 0 ? moved : sum(step[r][k], moved);  // 0 + (-0) is another zero
        }
      }
    }
    if (weights.count == 0) continue;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (row + r >= rows) break;
      float w[kLaneColumns];
      load_lane(weights, weight.dtype, row + r, w);
#pragma unroll
      for (int k = 0; k < kLaneColumns; ++k) w[k] = sum(product(w[k], keep), step[r][k]);
      store_lane(weights, weight.dtype, row + r, w);
    }
  }
}

}  // namespace

int zeroth_order_update(const FormulaNoise& noise, const Matrix& weight, int64_t rows, int64_t columns, float keep,
                        void* stream) {
  if (rows == 0 || columns == 0 || noise.count == 0) return 0;
  const int64_t column_tiles = ceil_div<int64_t>(columns, kWarpColumns);
  const int64_t tiles = column_tiles * ceil_div<int64_t>(rows, kWarpRows);
  LGK_LAUNCH(update, dim3(ceil_div<int64_t>(tiles, kWarps)), dim3(kThreads), kWarps * kTile * sizeof(uint32_t), stream,
             noise_of(noise, rows, columns), noise.count, weight, column_tiles, keep);
  return launch_status();
}

}  // namespace lgk::cuda
