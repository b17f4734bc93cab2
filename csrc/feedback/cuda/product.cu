// dX = grad F for few rows M of grad: F is made in registers and read from memory nowhere.
//
//   out[m, k] = scale * sum over n of grad[m, n] * (F / scale)[n, k], in float32
//
// Made for M so small that reading W bounds the time. A warp takes 128 columns k and every row_warps-th tile of four
// rows n; the signs of the next tile are loaded before the multiply-adds of this one. The warps of a block, then the
// splits of n, are summed in a fixed order that depends on the shape alone.
#include "common/cuda/formula.h"
#include "feedback/cuda/kernels.h"

namespace lgk::cuda {
namespace {

constexpr int kRows = 8;          // rows m of grad that a block takes
constexpr int kChunk = kThreads;  // rows n whose grad lies in shared memory

struct Split {
  int row_warps, column_warps, count;  // warps of a block along n and k; splits of n
  int64_t column_blocks, rows;         // rows of a split
};

// Columns n of kRows rows of grad, one column a thread, into shared (kThreads, kRows); zeros from m and end on.
template <typename T>
LGK_DEVICE void load_grad(const StridedMatrix& grad, int64_t first_m, int64_t m, int64_t n, int64_t end,
                          float* shared) {
  const bool inside = n + threadIdx.x < end;
  const T* const column = static_cast<const T*>(grad.data) + first_m * grad.row_stride +
                          (inside ? n + threadIdx.x : 0) * grad.column_stride;
  const int rows = inside ? static_cast<int>(min(m - first_m, int64_t{kRows})) : 0;
#pragma unroll 1
  for (int k = 0; k < kRows; k += 4) {  // all at once would take a register for each address
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = k + i < rows ? to_float(column[(k + i) * grad.row_stride]) : 0.0f;
    store<float, 4>(shared + threadIdx.x * kRows + k, value, 4, true);
  }
}

LGK_DEVICE void load_grad(const StridedMatrix& grad, int64_t first_m, int64_t m, int64_t n, int64_t end,
                          float* shared) {
  if (grad.dtype == kFloat32) {
    load_grad<float>(grad, first_m, m, n, end, shared);
  } else if (grad.dtype == kBFloat16) {
    load_grad<bf16>(grad, first_m, m, n, end, shared);
  } else {
    load_grad<f16>(grad, first_m, m, n, end, shared);
  }
}

// Grid (column_blocks * ceil(m / kRows), splits): blocks of the same columns run side by side, so that W comes from the
// L2 cache for all but the first. out: (m, columns), or with several splits their float32 sums without the scale.
__global__ void __launch_bounds__(kThreads, 2)
    product(Formula f, StridedMatrix grad, int64_t m, Split split, void* __restrict__ out, int dtype) {
  LGK_DYNAMIC_SHARED(float, shared);  // (kChunk, kRows) of grad; (warps, kTile) to make tiles, then for the sums
  float* const sums = shared + kChunk * kRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* const tile = reinterpret_cast<uint32_t*>(sums) + warp * kTile;
  const int64_t m_tiles = ceil_div<int64_t>(m, kRows), first_m = blockIdx.x % m_tiles * kRows;
  const int64_t first_column = blockIdx.x / m_tiles * split.column_warps * kWarpColumns;
  const int64_t warp_column = first_column + warp / split.row_warps * kWarpColumns;
  const int64_t begin = blockIdx.y * split.rows, column = warp_column + lane * kLaneColumns;
  const LaneSource source = lane_source(f, begin, min(begin + split.rows, f.rows), column);
  const RandomState state = random_state(f);
  const int step = split.row_warps * kTileRows;

  float sum[kRows][kLaneColumns] = {};
  int row = warp % split.row_warps * kTileRows;
  Bits bits;
  load_signs(f, source, row, bits);
  for (int chunk = 0; chunk < source.rows; chunk += kChunk) {
    __syncthreads();
    load_grad(grad, first_m, m, begin + chunk, begin + source.rows, shared);
    __syncthreads();
    for (; row < min(chunk + kChunk, source.rows); row += step) {
      const uint32_t first = static_cast<uint32_t>(begin + row);
      begin_tile(f, state, [=](int r) { return first + r; }, warp_column, lane, tile);
      const float* const g = shared + (row - chunk) * kRows;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        float value[kLaneColumns];
        row_values(f, source, row, r, lane, bits[r], tile, value);
        load_signs(f, source, row + step + r, bits[r]);  // of the next tile
#pragma unroll
        for (int k = 0; k < kRows; k += 4) {
          const Pack<float, 4> four = *reinterpret_cast<const Pack<float, 4>*>(g + r * kRows + k);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int c = 0; c < kLaneColumns; ++c) sum[k + i][c] = fmaf(four.element[i], value[c], sum[k + i][c]);
        }
      }
    }
  }

#pragma unroll
  for (int k = 0; k < kRows; k += kTileRows) {  // four rows of the result at a time
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
      store<float, kLaneColumns>(sums + warp * kTile + r * kWarpColumns + lane * kLaneColumns, sum[k + r], kLaneColumns,
                                 true);
    __syncthreads();
    for (int i = threadIdx.x; i < split.column_warps * kTileRows * 32; i += kThreads) {
      const int column_warp = i / (kTileRows * 32), r = i / 32 % kTileRows;
      float total[kLaneColumns] = {};
      for (int w = 0; w < split.row_warps; ++w) {
        const float* const part = sums + (column_warp * split.row_warps + w) * kTile + r * kWarpColumns;
        const Pack<float, 4> four = *reinterpret_cast<const Pack<float, 4>*>(part + i % 32 * kLaneColumns);
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) total[c] += four.element[c];
      }
      const int64_t out_column = first_column + column_warp * kWarpColumns + i % 32 * kLaneColumns;
      const int64_t out_row = first_m + k + r;
      if (out_row >= m || out_column >= f.columns) continue;
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) total[c] *= split.count > 1 ? 1.0f : f.scale;
      const int64_t target_row = split.count > 1 ? blockIdx.y * m + out_row : out_row;
      store_lane(row_reader(out, dtype, f.columns, target_row, out_column, f.columns), dtype, 0, total);
    }
  }
}

// out[i] = scale * sum over the splits of partial[split, i], four elements a thread.
__global__ void __launch_bounds__(kThreads, 2)
    sum_splits(const float* __restrict__ partial, int splits, int64_t elements, float scale, void* __restrict__ out,
               int dtype) {
  const int64_t k = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kLaneColumns;
  if (k >= elements) return;
  const RowReader parts = row_reader(partial, kFloat32, elements, 0, k, elements);
  float total[kLaneColumns] = {};
  for (int split = 0; split < splits; ++split) {
    float part[kLaneColumns];
    load_lane<float>(parts, split, part);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) total[c] += part[c];
  }
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) total[c] *= scale;
  store_lane(row_reader(out, dtype, 0, 0, k, elements), dtype, 0, total);
}

// Enough blocks to fill a large GPU, each with enough rows of F that their sums are little work beside it.
constexpr int64_t kBlocks = 1024;
constexpr int64_t kRowsPerSplit = 64;

Split divide(const Formula& f, int64_t m) {
  const int64_t tiles = ceil_div<int64_t>(f.rows, kTileRows), column_tiles = ceil_div<int64_t>(f.columns, kWarpColumns);
  // Eight tiles of rows a warp, if there are as many; else the warps stand side by side, where there are columns.
  const int row_warps =
      std::max(power_of_two_from(tiles / 8, kWarps), kWarps / power_of_two_from(column_tiles, kWarps));
  const int column_warps = kWarps / row_warps;
  const int64_t column_blocks = ceil_div<int64_t>(column_tiles, column_warps);
  const int64_t blocks = column_blocks * ceil_div<int64_t>(m, kRows);
  const int64_t wanted = std::min(ceil_div(kBlocks, blocks), ceil_div(f.rows, kRowsPerSplit));
  const int64_t rows = ceil_div<int64_t>(ceil_div(f.rows, wanted), kWarps * kTileRows) * kWarps * kTileRows;
  return Split{row_warps, column_warps, static_cast<int>(ceil_div(f.rows, rows)), column_blocks, rows};
}

}  // namespace

int feedback_product_splits(const Formula& f, int64_t m) {
  return m == 0 || f.rows == 0 || f.columns == 0 ? 1 : divide(f, m).count;
}

int feedback_product(const Formula& f, const StridedMatrix& grad, int64_t m, void* out, int dtype, float* scratch,
                     void* stream) {
  if (m == 0 || f.columns == 0) return 0;
  if (f.rows == 0) return kInvalidArgument;
  const Split split = divide(f, m);
  LGK_LAUNCH(product, dim3(split.column_blocks * ceil_div<int64_t>(m, kRows), split.count), dim3(kThreads),
             (kChunk * kRows + kWarps * kTile) * sizeof(float), stream, f, grad, m, split,
             split.count > 1 ? static_cast<void*>(scratch) : out, split.count > 1 ? kFloat32 : dtype);
  const int status = launch_status();
  if (status != 0 || split.count == 1) return status;
  const int64_t elements = m * f.columns;
  LGK_LAUNCH(sum_splits, dim3(ceil_div<int64_t>(elements, kThreads * kLaneColumns)), dim3(kThreads), 0, stream, scratch,
             split.count, elements, f.scale, out, dtype);
  return launch_status();
}

}  // namespace lgk::cuda
