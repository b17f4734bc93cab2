// Feedback matrices written out, and packed signs.
//
//   F = scale * value | scale * |value| * sign(W),  value = 1 | magnitude | law(row, column)
//   packed word j of a row: bit i is set where W[row, 32 j + i] < 0
//
// A warp makes tiles of 4 rows by 128 columns (feedback_device.h).
#include "common/cuda/formula.h"
#include "feedback/cuda/kernels.h"

namespace lgk::cuda {
namespace {

constexpr int kWarpRows = 4 * kTileRows;  // of the 128 columns that a warp takes

struct Place {
  int64_t row, column;
};

// Where the warp's work begins: warps side by side along the columns.
LGK_DEVICE Place warp_place(int64_t column_tiles) {
  const int64_t tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  return Place{tile / column_tiles * kWarpRows, tile % column_tiles * kWarpColumns};
}

__global__ void __launch_bounds__(kThreads, 2) write_matrix(Formula f, const int64_t* __restrict__ index,
                                                            int64_t column_tiles, void* __restrict__ out, int dtype) {
  LGK_DYNAMIC_SHARED(uint32_t, shared);  // (warps, kTile)
  const Place place = warp_place(column_tiles);
  if (place.row >= f.rows) return;  // the whole warp
  uint32_t* const tile = shared + threadIdx.x / 32 * kTile;
  const int lane = threadIdx.x % 32;
  const int64_t column = place.column + lane * kLaneColumns;
  const LaneSource source = lane_source(f, place.row, min(place.row + kWarpRows, f.rows), column);
  const RowReader target = row_reader(out, dtype, f.columns, place.row, column, f.columns);
  const RandomState state = random_state(f);
  Bits bits;
  load_signs(f, source, 0, bits);
  for (int row = 0; row < source.rows; row += kTileRows) {
    const auto law_row = [&](int r) {
      const int64_t k = place.row + min(row + r, source.rows - 1);
      return static_cast<uint32_t>(index == nullptr ? k : index[k]);
    };
    begin_tile(f, state, law_row, place.column, lane, tile);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      float value[kLaneColumns];
      row_values(f, source, row, r, lane, bits[r], tile, value);
      load_signs(f, source, row + kTileRows + r, bits[r]);  // of the next tile
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c) value[c] *= f.scale;
      if (row + r < source.rows && target.count > 0) store_lane(target, dtype, row + r, value);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    pack_signs(Formula f, int64_t column_tiles, int64_t words, uint32_t* __restrict__ out) {
  const Place place = warp_place(column_tiles);
  if (place.row >= f.rows) return;  // the whole warp
  const int lane = threadIdx.x % 32;
  const int64_t column = place.column + lane * kLaneColumns;
  const LaneSource source = lane_source(f, place.row, min(place.row + kWarpRows, f.rows), column);
  const uint32_t infinity = infinity_bits(f.weight.dtype);
  for (int row = 0; row < source.rows; row += kTileRows) {
    Bits bits;
    load_signs(f, source, row, bits);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      uint32_t word = 0;
#pragma unroll
      for (int c = 0; c < kLaneColumns; ++c)
        word |= static_cast<uint32_t>(is_number_but_zero(bits[r][c], infinity) && bits[r][c] >> 31) << c;
      word <<= 4 * (lane % 8);
#pragma unroll
      for (int step = 1; step < 8; step *= 2) word |= __shfl_xor_sync(kAllLanes, word, step);  // eight lanes a word
      if (lane % 8 == 0 && row + r < source.rows && column < f.columns)
        out[(place.row + row + r) * words + column / 32] = word;
    }
  }
}

struct Grid {
  int64_t column_tiles, blocks;
};

Grid tiles(const Formula& f) {
  const int64_t column_tiles = ceil_div<int64_t>(f.columns, kWarpColumns);
  return Grid{column_tiles, ceil_div<int64_t>(column_tiles * ceil_div<int64_t>(f.rows, kWarpRows), kWarps)};
}

}  // namespace

int feedback_matrix(const Formula& f, const int64_t* index, void* out, int dtype, void* stream) {
  if (f.rows == 0 || f.columns == 0) return 0;
  const Grid grid = tiles(f);
  const size_t shared = f.value == kRandom ? kWarps * kTile * sizeof(uint32_t) : 0;
  LGK_LAUNCH(write_matrix, dim3(grid.blocks), dim3(kThreads), shared, stream, f, index, grid.column_tiles, out, dtype);
  return launch_status();
}

int feedback_pack_signs(const Formula& f, uint32_t* out, void* stream) {
  if (f.rows == 0 || f.columns == 0) return 0;
  const Grid grid = tiles(f);
  LGK_LAUNCH(pack_signs, dim3(grid.blocks), dim3(kThreads), 0, stream, f, grid.column_tiles,
             ceil_div<int64_t>(f.columns, 32), out);
  return launch_status();
}

}  // namespace lgk::cuda
