// Rows of W + c Z, as an embedding picks them, or one after the other for the library's products.
//
//   out[m, r] = W[i] + c_m Z_m[i], i = index[m, r] or first + r; without a weight c_m Z_m[i]; nan where there is no row
//   i
#include "zeroth_order/cuda/noise.h"

namespace lgk::cuda {
namespace {

constexpr int kWarpRows = kTileRows;  // of the 128 columns that a warp takes: an embedding may pick few

struct Rows {
  int64_t count, first, column_tiles;  // of out a member; the first of the weight
  const int64_t* index;
};

// Grid (tiles of a member, members).
__global__ void __launch_bounds__(kThreads, 2)
    write_rows(Noise noise, Rows rows, Matrix weight, char* __restrict__ out, int dtype) {
  LGK_DYNAMIC_SHARED(uint32_t, shared);  // (warps, kTile)
  const Formula law = law_of(noise);
  const WarpPlace place = place_of_warp(rows.column_tiles, kWarpRows);
  if (place.row >= rows.count) return;  // the whole warp
  uint32_t* const tile = shared + threadIdx.x / 32 * kTile;
  const int lane = threadIdx.x % 32;
  const int64_t member = blockIdx.y, column = place.column + lane * kLaneColumns;
  const auto row_of = [&](int r) {
    const int64_t k = min(place.row + r, rows.count - 1);
    return rows.index == nullptr ? rows.first + k : rows.index[member * rows.count + k];
  };
  begin_tile(
      law, state_of(noise, member), [&](int r) { return static_cast<uint32_t>(row_of(r)); }, place.column, lane, tile);
  const float c = noise.coefficients[member];
  const RowReader weights = row_reader(weight.data, weight.dtype, weight.stride, 0, column, law.columns);
  const RowReader target = row_reader(out, dtype, law.columns, member * rows.count + place.row, column, law.columns);
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t row = row_of(r);
    const bool there = row >= 0 && row < law.rows;
    float value[kLaneColumns], w[kLaneColumns] = {};
    noise_values(law, r, lane, tile, value);
    if (weight.dtype != kNoMatrix && there && weights.count > 0) load_lane(weights, weight.dtype, row, w);
#pragma unroll
    for (int k = 0; k < kLaneColumns; ++k) value[k] = there ? fmaf(c, value[k], w[k]) : __uint_as_float(0x7fc00000u);
    if (place.row + r < rows.count && target.count > 0) store_lane(target, dtype, r, value);
  }
}

}  // namespace

int zeroth_order_rows(const FormulaNoise& noise, const Members& shape, const Matrix& weight, const int64_t* index,
                      int64_t first, void* out, int dtype, void* stream) {
  if (shape.members == 0 || shape.rows == 0 || shape.inputs == 0) return 0;
  const Rows rows{shape.rows, first, ceil_div<int64_t>(shape.inputs, kWarpColumns), index};
  const int64_t tiles = rows.column_tiles * ceil_div<int64_t>(shape.rows, kWarpRows);
  LGK_LAUNCH(write_rows, dim3(ceil_div<int64_t>(tiles, kWarps), shape.members), dim3(kThreads),
             kWarps * kTile * sizeof(uint32_t), stream, noise_of(noise, shape.outputs, shape.inputs), rows, weight,
             static_cast<char*>(out), dtype);
  return launch_status();
}

}  // namespace lgk::cuda
