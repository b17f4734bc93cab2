// How the feedback kernels make F in registers: tiles of 4 rows by 128 columns, 4 x 4 elements a lane of a warp.
#pragma once
#include "common/cuda/device.h"
#include "common/formula.h"

namespace lgk::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 4;
constexpr int kLaneColumns = 4;
constexpr int kWarpColumns = 32 * kLaneColumns;
constexpr int kTile = kTileRows * kWarpColumns;  // floats of shared memory that a warp needs to make a tile

using Lane = float[kLaneColumns];
using Bits = uint32_t[kTileRows][kLaneColumns];

// -- tensors of a dtype known at run time: the branch is the same for all threads of a kernel ---------------------

LGK_DEVICE float load_element(const StridedMatrix& tensor, int64_t row, int64_t column) {
  const int64_t k = row * tensor.row_stride + column * tensor.column_stride;
  if (tensor.dtype == kFloat32) return static_cast<const float*>(tensor.data)[k];
  if (tensor.dtype == kBFloat16) return to_float(static_cast<const bf16*>(tensor.data)[k]);
  return to_float(static_cast<const f16*>(tensor.data)[k]);
}

// A lane's four columns in each row of a dense matrix, as bytes, so that one address serves every dtype. That address
// is the matrix's plus a number, also where nothing is to be read: with a null of its own the compiler could no longer
// tell that it is one of global memory.
struct RowReader {
  const char* data;  // at the lane's first column of row 0
  int64_t stride;    // bytes from row to row
  int count;         // columns within the matrix, of four; 0 too where there is no matrix
  bool vectors;      // all four, and every row aligned to their size
};

LGK_DEVICE int lane_count(int64_t columns, int64_t column) {
  return static_cast<int>(max(min(columns - column, int64_t{kLaneColumns}), int64_t{0}));
}

LGK_DEVICE int element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Columns from `column` on (a multiple of 4), rows from `row` on.
LGK_DEVICE RowReader row_reader(const void* data, int dtype, int64_t stride, int64_t row, int64_t column,
                                int64_t columns) {
  const int count = data == nullptr ? 0 : lane_count(columns, column), size = element_size(dtype);
  const uintptr_t address = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * size);
  const int64_t from = count == 0 ? 0 : (row * stride + column) * size;
  return RowReader{static_cast<const char*>(data) + from, stride * size, count,
                   count == kLaneColumns && address % (kLaneColumns * size) == 0};
}

template <typename T>
LGK_DEVICE Pack<T, kLaneColumns> load_row(const RowReader& reader, int64_t row) {
  const T* const address = reinterpret_cast<const T*>(reader.data + row * reader.stride);
  return load<T, kLaneColumns>(address, reader.count, reader.vectors);
}

template <typename T>
LGK_DEVICE void load_lane(const RowReader& reader, int64_t row, Lane& value) {
  const Pack<T, kLaneColumns> pack = load_row<T>(reader, row);
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) value[c] = to_float(pack.element[c]);
}

LGK_DEVICE void load_lane(const RowReader& reader, int dtype, int64_t row, Lane& value) {
  if (dtype == kFloat32) {
    load_lane<float>(reader, row, value);
  } else if (dtype == kBFloat16) {
    load_lane<bf16>(reader, row, value);
  } else {
    load_lane<f16>(reader, row, value);
  }
}

template <typename T>
LGK_DEVICE void store_lane(const RowReader& place, int64_t row, const Lane& value) {
  store<T, kLaneColumns>(reinterpret_cast<T*>(const_cast<char*>(place.data) + row * place.stride), value, place.count,
                         place.vectors);
}

LGK_DEVICE void store_lane(const RowReader& place, int dtype, int64_t row, const Lane& value) {
  if (dtype == kFloat32) {
    store_lane<float>(place, row, value);
  } else if (dtype == kBFloat16) {
    store_lane<bf16>(place, row, value);
  } else {
    store_lane<f16>(place, row, value);
  }
}

// -- signs ------------------------------------------------------------------------------------------------------

// A lane's columns of F in `rows` rows from first_row on; the kernels count rows from there.
struct LaneSource {
  RowReader weight, magnitude;  // of packed signs the word that has the lane's bits
  int rows;
  int bit;  // the lane's first in that word
};

LGK_DEVICE LaneSource lane_source(const Formula& f, int64_t first_row, int64_t end, int64_t column) {
  const bool packed = f.weight.dtype == kPackedSigns;
  const int64_t from = packed ? column >> 5 : column, columns = packed ? ceil_div<int64_t>(f.columns, 32) : f.columns;
  return LaneSource{
      row_reader(f.weight.data, packed ? kFloat32 : f.weight.dtype, f.weight.stride, first_row, from, columns),
      row_reader(f.magnitude.data, f.magnitude.dtype, f.magnitude.stride, first_row, column, f.columns),
      static_cast<int>(end - first_row), static_cast<int>(column & 31)};
}

// Bits of four weights, whatever their dtype: sign in bit 31, zero where the lower 31 are, NaN above `infinity`; zeros
// outside of the matrix.
LGK_DEVICE void load_signs(const Formula& f, const LaneSource& lane, int row, uint32_t (&bits)[kLaneColumns]) {
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) bits[c] = 0;
  if (lane.weight.count == 0 || row >= lane.rows) return;
  if (f.weight.dtype == kFloat32) {
    const Pack<float, kLaneColumns> pack = load_row<float>(lane.weight, row);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) bits[c] = __float_as_uint(pack.element[c]);
  } else if (f.weight.dtype != kPackedSigns) {  // f16 as well: only the bits are read
    const Pack<bf16, kLaneColumns> pack = load_row<bf16>(lane.weight, row);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) bits[c] = static_cast<uint32_t>(pack.element[c].bits) << 16;
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(lane.weight.data + row * lane.weight.stride);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) bits[c] = word >> (lane.bit + c) << 31 | 0x3f800000u;
  }
}

LGK_DEVICE void load_signs(const Formula& f, const LaneSource& lane, int row, Bits& bits) {
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) load_signs(f, lane, row + r, bits[r]);
}

LGK_DEVICE bool is_number_but_zero(uint32_t bits, uint32_t infinity) { return (bits & 0x7fffffffu) - 1u < infinity; }

LGK_DEVICE uint32_t infinity_bits(int weight_kind) { return weight_kind == kFloat16 ? 0x7c000000u : 0x7f800000u; }

// +-1, and `zero` for +-0 and NaN
LGK_DEVICE float sign_value(uint32_t bits, uint32_t infinity, float zero) {
  return is_number_but_zero(bits, infinity) ? __uint_as_float((bits & 0x80000000u) | 0x3f800000u) : zero;
}

// -- values -----------------------------------------------------------------------------------------------------

// (seed, stream, step) in registers
struct RandomState {
  uint32_t key_low, key_high, stream, step;
};

LGK_DEVICE RandomState random_state(const Formula& f) {
  if (f.value != kRandom) return RandomState{0, 0, 0, 0};
  const uint64_t seed = static_cast<uint64_t>(f.state[0]);
  return RandomState{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(f.state[1]),
                     static_cast<uint32_t>(f.state[2])};
}

// Keeps what is computed from `value` inside of a loop: the compiler would hold the ten keys of Philox in registers.
LGK_DEVICE uint32_t not_hoisted(uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

LGK_DEVICE Words random_words(const RandomState& s, uint32_t row, uint32_t block) {
  return philox(block, row, s.step, s.stream, not_hoisted(s.key_low), not_hoisted(s.key_high));
}

// Sine and cosine of an angle in [0, 2 pi], within an ulp or two: the library's, which take any angle, need a stack.
LGK_DEVICE void sine_cosine(float angle, float* sine, float* cosine) {
  const float quarter = rintf(angle * 0.636619772f);
  float r = fmaf(-quarter, 1.57079637050628662f, angle);  // pi / 2 in three parts
  r = fmaf(-quarter, -4.37113882867379e-8f, r);
  r = fmaf(-quarter, -1.71512489e-15f, r);
  const float square = r * r;
  const float sine_tail = fmaf(square, fmaf(square, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f);
  const float s = fmaf(r * square, sine_tail, r);
  const float tail = fmaf(square, fmaf(square, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f);
  const float c = fmaf(square * square, tail, fmaf(-0.5f, square, 1.0f));
  const int q = static_cast<int>(quarter);
  *sine = q & 1 ? c : s;
  *cosine = q & 1 ? s : c;
  if (q & 2) *sine = -*sine;
  if ((q + 1) & 2) *cosine = -*cosine;
}

// law_values of philox.h for the two laws with four values a call
LGK_DEVICE void four_values(int law, const Words& words, const Range& range, Lane& value) {
  if (law == kUniform) {
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) value[c] = uniform_value(words.w[c], range);
    return;
  }
#pragma unroll
  for (int c = 0; c < kLaneColumns; c += 2) {
    const float radius = sqrtf(-2.0f * logf(unit(words.w[c])));
    float sine, cosine;
    sine_cosine(unit(words.w[c + 1]) * 6.28318530717958647692f, &sine, &cosine);
    value[c] = (radius * cosine) * range.scale;
    value[c + 1] = (radius * sine) * range.scale;
  }
}

// What the law makes of a tile, into `shared` (kTile words of the warp): the Philox words of uniform8 and sign, which
// serve 16 and 128 columns a call and so several lanes, and the values of the other two. row_values() turns it into
// values. law_row(r): the law's row for row r of the tile.
template <typename LawRow>
LGK_DEVICE void begin_tile(const Formula& f, const RandomState& s, LawRow law_row, int64_t warp_column, int lane,
                           uint32_t* shared) {
  using Quad = Pack<uint32_t, 4>;
  if (f.value != kRandom) return;
  Quad* const quads = reinterpret_cast<Quad*>(shared);
  __syncwarp();  // the tile before has been read
  if (f.law == kUniform8 || f.law == kSign) {
    const bool bytes = f.law == kUniform8;
    const Words call = random_words(s, law_row(bytes ? lane / 8 : lane % kTileRows),
                                    static_cast<uint32_t>(bytes ? (warp_column >> 4) + lane % 8 : warp_column >> 7));
    if (bytes || lane < kTileRows) quads[lane] = Quad{call.w[0], call.w[1], call.w[2], call.w[3]};
  } else {
#pragma unroll 1
    for (int r = 0; r < kTileRows; ++r) {  // not unrolled: much code
      float four[4];
      four_values(f.law, random_words(s, law_row(r), static_cast<uint32_t>((warp_column >> 2) + lane)), f.range, four);
      quads[32 * r + lane] =
          Quad{__float_as_uint(four[0]), __float_as_uint(four[1]), __float_as_uint(four[2]), __float_as_uint(four[3])};
    }
  }
  __syncwarp();
}

// F / scale at this lane's columns of row r of the tile at `row`; finite, and unused, outside of the matrix.
LGK_DEVICE void row_values(const Formula& f, const LaneSource& source, int row, int r, int lane,
                           const uint32_t (&bits)[kLaneColumns], const uint32_t* shared, Lane& value) {
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) value[c] = 1.0f;
  if (f.value == kMagnitude) {
    if (source.magnitude.count > 0 && row + r < source.rows)
      load_lane(source.magnitude, f.magnitude.dtype, row + r, value);
  } else if (f.value == kRandom && f.law == kUniform8) {
    const uint32_t word = shared[32 * r + lane];
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) value[c] = uniform8_value(word >> (8 * c) & 255u, f.range);
  } else if (f.value == kRandom && f.law == kSign) {
    const uint32_t word = shared[4 * r + lane / 8] >> (4 * (lane % 8));
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) value[c] = word >> c & 1u ? -f.range.scale : f.range.scale;
  } else if (f.value == kRandom) {
    const Pack<uint32_t, 4> four = *reinterpret_cast<const Pack<uint32_t, 4>*>(shared + (32 * r + lane) * 4);
#pragma unroll
    for (int c = 0; c < kLaneColumns; ++c) value[c] = __uint_as_float(four.element[c]);
  }
  if (f.weight.dtype == kNoMatrix) return;
  const uint32_t infinity = infinity_bits(f.weight.dtype);
  const float zero = f.sign_plus ? 1.0f : 0.0f;
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) value[c] = fabsf(value[c]) * sign_value(bits[c], infinity, zero);
}

}  // namespace lgk::cuda
