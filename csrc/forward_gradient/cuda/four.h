// What the family's kernels share: four neighbouring elements of a tensor whose dtype is known at run time (the branch
// is the same for all threads), and sums over the lanes that share a row.
#pragma once
#include "common/cuda/device.h"
#include "forward_gradient/cuda/kernels.h"

namespace lgk::cuda {

using Four = float[4];

// `vectors`: each group of four that starts at a multiple of four lies whole and aligned.
struct Fours {
  const void* data;
  int dtype;
  bool vectors;
};

// `contiguous`: elements that lie side by side, of which fours are taken.
inline Fours fours(const Array& array, int64_t contiguous) {
  return Fours{array.data, array.dtype,
               contiguous % 4 == 0 && is_aligned(array.data, array.dtype == kFloat32 ? 16 : 8)};
}

template <typename T>
LGK_DEVICE void read_four(const Fours& array, int64_t at, int count, Four& value) {
  const Pack<T, 4> pack = load<T, 4>(static_cast<const T*>(array.data) + at, count, array.vectors && count >= 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = to_float(pack.element[i]);
}

// The elements from `at` on; only the first `count` are read, the rest are 0.
LGK_DEVICE void read_four(const Fours& array, int64_t at, int count, Four& value) {
  if (array.dtype == kFloat32) {
    read_four<float>(array, at, count, value);
  } else if (array.dtype == kBFloat16) {
    read_four<bf16>(array, at, count, value);
  } else {
    read_four<f16>(array, at, count, value);
  }
}

LGK_DEVICE void write_four(const Fours& array, int64_t at, int count, const Four& value) {
  void* const data = const_cast<void*>(array.data);
  const bool aligned = array.vectors && count >= 4;
  if (array.dtype == kFloat32) {
    store<float, 4>(static_cast<float*>(data) + at, value, count, aligned);
  } else if (array.dtype == kBFloat16) {
    store<bf16, 4>(static_cast<bf16*>(data) + at, value, count, aligned);
  } else {
    store<f16, 4>(static_cast<f16*>(data) + at, value, count, aligned);
  }
}

// Of `lanes` neighbouring lanes, a power of two up to a warp.
LGK_DEVICE float lanes_sum(float value, int lanes) {
  for (int step = 1; step < lanes; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Threads of a block: `lanes` for each of `rows` rows of `length` elements; whole warps.
struct RowBlock {
  int lanes, rows;
};

inline RowBlock row_block(int64_t rows, int64_t length, int threads) {
  const int lanes = power_of_two_from(ceil_div<int64_t>(length, 4), 32);
  return RowBlock{lanes, std::max(power_of_two_from(rows, threads / lanes), 32 / lanes)};
}

}  // namespace lgk::cuda
