#include "lls/cpu/sign_layouts.h"

namespace lgk::cpu {

int64_t sign_layouts_size(int64_t rows, int64_t dim) {
  return (dim + 31) / 32 * ((rows + 15) / 16 * 16) + (rows + 31) / 32 * ((dim + 15) / 16 * 16);
}

void sign_layouts(const uint32_t* signs, int64_t rows, int64_t dim, uint32_t* out) {
  const int64_t words = (dim + 31) / 32, stride = (rows + 15) / 16 * 16, width = (dim + 15) / 16 * 16;
  uint32_t* transposed = out + words * stride;
  for (int64_t i = 0; i < sign_layouts_size(rows, dim); ++i) out[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = 0; w < words; ++w) out[w * stride + r] = signs[r * words + w];
    for (int64_t j = 0; j < dim; ++j)
      transposed[r / 32 * width + j] |= (signs[r * words + j / 32] >> j % 32 & 1) << r % 32;
  }
}

}  // namespace lgk::cpu
