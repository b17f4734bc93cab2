// Tiles of 4 rows by 128 columns of Z (common/cuda/formula.h), one matrix after the other.
#pragma once
#include "common/cuda/formula.h"
#include "zeroth_order/cuda/kernels.h"

namespace lgk::cuda {

// Z's law, and where the states of its matrices lie, `stride` numbers apart: 0 of one for all.
struct Noise {
  Formula law;
  const int64_t* states;
  int64_t stride;
  const float* coefficients;
};

inline Noise noise_of(const FormulaNoise& noise, int64_t rows, int64_t columns) {
  return Noise{noise.formula(0, rows, columns), noise.states, noise.count > 1 ? 3 : 0, noise.coefficients};
}

LGK_DEVICE RandomState state_of(const Noise& noise, int64_t matrix) {
  const int64_t* const state = noise.states + matrix * noise.stride;
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  return RandomState{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(state[1]),
                     static_cast<uint32_t>(state[2])};
}

// The law alone, as a formula in which nothing else is left to decide at run time.
LGK_DEVICE Formula law_of(const Noise& noise) {
  Formula law = noise.law;
  law.value = kRandom;
  law.weight = law.magnitude = Matrix{};
  return law;
}

// Z at this lane's columns of row r of the tile that begin_tile() has begun.
LGK_DEVICE void noise_values(const Formula& law, int r, int lane, const uint32_t* tile, Lane& value) {
  const uint32_t no_signs[kLaneColumns] = {};
  row_values(law, LaneSource{}, 0, r, lane, no_signs, tile, value);
}

// Where a warp's 128 columns begin, and its first row: warps side by side along the columns, `rows` of each below.
struct WarpPlace {
  int64_t row, column;
};

LGK_DEVICE WarpPlace place_of_warp(int64_t column_tiles, int rows) {
  const int64_t tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  return WarpPlace{tile / column_tiles * rows, tile % column_tiles * kWarpColumns};
}

}  // namespace lgk::cuda
