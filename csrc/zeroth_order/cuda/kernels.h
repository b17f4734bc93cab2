// The CUDA entry points of the family zeroth_order (lgkernels/ops/zeroth_order/reference.py defines what they compute).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include "zeroth_order/noise.h"

namespace lgk::cuda {

// out (members, rows, outputs) = x[m] (W + c_m Z_m)^T + b in float32 multiply-adds, Z in registers; x (members * rows,
// inputs) and out of one dtype, for few rows
int zeroth_order_product(const FormulaNoise& noise, const Members& shape, const Matrix& weight, const Matrix& x,
                         const Matrix& bias, void* out, void* stream);

// out (members, rows, inputs): rows of W + c_m Z_m, `outputs` of which there are, or of c_m Z_m where there is no
// weight; row r is index[m, r], or first + r where there is no index; nan where there is no such row
int zeroth_order_rows(const FormulaNoise& noise, const Members& shape, const Matrix& weight, const int64_t* index,
                      int64_t first, void* out, int dtype, void* stream);

// W <- keep W + sum_i c_i Z_i in place, W (rows, columns); each operation is rounded by itself
int zeroth_order_update(const FormulaNoise& noise, const Matrix& weight, int64_t rows, int64_t columns, float keep,
                        void* stream);

}  // namespace lgk::cuda
