// Matrices, and feedback matrices by a formula, as the kernels of both processors take them.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "common/philox.h"

namespace lgk {

// Codes beside the dtypes' for a weight of which the signs alone count: there is none; uint32 words, where bit j % 32
// of word j / 32 is set for a negative element.
constexpr int kNoMatrix = -1, kPackedSigns = 3;

// Rows are dense and `stride` elements (words of packed signs) apart.
struct Matrix {
  void* data = nullptr;  // null: there is none
  int64_t stride = 0;
  int dtype = kNoMatrix;
};

// A matrix whose columns may be apart, too; strides in elements.
struct StridedMatrix {
  const void* data;
  int dtype;
  int64_t row_stride, column_stride;
};

enum Value : int { kOnes = 0, kMagnitude = 1, kRandom = 2 };

// F (rows, columns) = scale * value without weight, scale * |value| * sign(weight) with one.
struct Formula {
  int64_t rows, columns;
  Matrix weight, magnitude;
  Value value;
  Law law;
  const int64_t* state;  // (seed, stream, step) of `law` where the value is random
  Range range;
  float scale;
  bool sign_plus;  // sign(0) = sign(nan) = 1, not 0
};

}  // namespace lgk
