// The CUDA entry points of the family feedback (lgkernels/ops/feedback/reference.py defines what they compute).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include "common/formula.h"

namespace lgk::cuda {

// out (rows, columns); row r is row index[r] of the law where `index` is given.
int feedback_matrix(const Formula& f, const int64_t* index, void* out, int dtype, void* stream);

// out (m, columns) = grad (m, rows) F in float32 multiply-adds, F in registers. Scratch: splits * m * columns floats
// where there is more than one split.
int feedback_product_splits(const Formula& f, int64_t m);
int feedback_product(const Formula& f, const StridedMatrix& grad, int64_t m, void* out, int dtype, float* scratch,
                     void* stream);

// out (rows, ceil(columns / 32)): bit j % 32 of word j / 32 is set where the weight is below zero.
int feedback_pack_signs(const Formula& f, uint32_t* out, void* stream);

}  // namespace lgk::cuda
